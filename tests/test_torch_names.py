"""Private names of torch are used in one place, and all exist in the torch that is installed."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fsdp_state
from torch.distributed.pipelining import stage as pipelining_stage
from torch.distributed.tensor import _api as dtensor_api
from torch.utils import checkpoint

from safestep import _torch

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "safestep").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def chain(node):
    """Return the names of ``a.b.c``, None of anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*reversed([*names, node.id])] if isinstance(node, ast.Name) else None


def private_names(tree):
    """Yield the private names of torch in a file, with their lines."""
    roots = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(map(is_private, names)):
                yield ".".join(names), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch" and any(
                    map(is_private, alias.name.split("."))
                ):
                    yield alias.name, node.lineno
    for node in ast.walk(tree):
        names = chain(node) if isinstance(node, ast.Attribute) else None
        private = set(filter(is_private, names or ()))
        if private - _torch.ATTRIBUTES.keys() and names[0] in roots:
            yield ".".join(names), node.lineno


def own_names(trees):
    """Return private attributes that the package itself defines."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


TREES = {path: ast.parse(path.read_text()) for path in FILES if path.name != "_torch.py"}


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_torch_come_from_one_file(path):
    found = [f"line {line}: {name}" for name, line in private_names(TREES[path])]

    assert not found, f"{path.name} uses {found}: import it from safestep._torch"


def test_private_attributes_of_others_objects_are_listed_with_a_reason():
    documented = {"_getframe", "_current_frames", "_fields", "_make"}  # of sys and named tuples
    known = own_names(TREES.values()) | _torch.ATTRIBUTES.keys() | documented
    found = {
        f"{path.name}:{node.lineno} {node.attr}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in known
    }

    assert not found


def test_torch_has_every_private_name():
    assert _torch.MISSING == [], f"torch {torch.__version__} lacks {_torch.MISSING}"


# Set in a constructor that needs a process group: looked for in the class's code.
SET_LATER = {
    "_join_config": torch.distributed.algorithms.Joinable,
    "_fsdp_param_group": _fsdp_state.FSDPState,
    "_reduce_scatter_comm": _fsdp_param_group.FSDPParamGroup,
}
# Of the compiler, which takes seconds to import.
COMPILER = (Path(torch.__file__).parent / "_dynamo" / "eval_frame.py").read_text()


def holders():
    """Return an object for each private attribute, that must have it."""
    tensor = torch.zeros(1, requires_grad=True)
    ddp, group = nn.parallel.DistributedDataParallel, torch.distributed.ProcessGroup
    found = dict.fromkeys(["_version", "_is_zerotensor", "_base"], tensor)
    found |= dict.fromkeys(["_indices", "_values"], tensor.detach().to_sparse())
    tables = ["_buffers", "_parameters", "_modules", "_backward_hooks", "_backward_pre_hooks"]
    found |= dict.fromkeys(tables, nn.Module())
    return found | {
        "_input_metadata": (tensor * 2).grad_fn,
        "_forward_cls": checkpoint.CheckpointFunction._backward_cls,
        "_saved_dim": tensor.softmax(0).grad_fn,
        "_saved_beta": nn.functional.softplus(tensor).grad_fn,
        "_current_level": forward_ad,
        "_enabled": torch.autocast("cpu", torch.bfloat16),
        "_get_backend": group,
        "_timeout": torch._C._distributed_c10d.Backend.Options,
        "_PipelineStageBase": pipelining_stage,
        **dict.fromkeys(["_FromTorchTensor", "_ToTorchTensor"], dtensor_api),
        "_op_dispatcher": dtensor_api.DTensor,
        "_custom_op_handlers": dtensor_api.DTensor._op_dispatcher,
        "_get_ddp_logging_data": ddp,
        "_get_fsdp_state": FSDPModule,
    }


@pytest.mark.parametrize("name", _torch.ATTRIBUTES)
def test_torch_has_the_private_attribute(name):
    message = f"torch {torch.__version__} lacks {name}: {_torch.ATTRIBUTES[name]}"
    if _torch.ATTRIBUTES[name].endswith("where torch has it"):
        pytest.skip("the code asks for it first")
    if "torch._dynamo" in _torch.ATTRIBUTES[name]:
        assert f"\n{name} = " in COMPILER or f"\ndef {name}(" in COMPILER, message
    elif name in SET_LATER:
        assert name in inspect.getsource(SET_LATER[name]), message
    else:
        assert hasattr(holders()[name], name), message


def test_a_name_that_torch_lacks_says_what_it_was_needed_for():
    gone = _torch._find("_C._of_a_past_torch", "to test")
    _torch.MISSING.remove("torch._C._of_a_past_torch")

    with pytest.raises(RuntimeError, match=r"expected torch to have `torch\._C\._of_a_past.*to"):
        gone()
