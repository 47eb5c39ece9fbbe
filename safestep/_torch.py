"""Every private name of torch that the package uses, and why no public one will do.

Each was seen in torch 2.11 and 2.13. One that a future torch lacks does not stop the import: what
needs it says so when it is called, and ``tests/test_torch_names.py`` names it at once.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch

MISSING: list[str] = []


def _find(path: str, why: str) -> Any:
    """Return what has this name in torch, or a function that raises where nothing has."""
    try:
        return reduce(getattr, path.split("."), torch)
    except AttributeError:
        MISSING.append(f"torch.{path}")

        def missing(*_: Any, **__: Any) -> Any:
            raise RuntimeError(
                f"safestep: expected torch to have `torch.{path}`, got torch {torch.__version__} "
                f"without it. It is needed {why}. Use a torch that safestep was tested with."
            )

        return missing


# Forward mode: a parameter gets its tangent in place, which the public API does not offer.
make_dual = _find("_make_dual", "to give a tensor a tangent without a look-up at each call")
unpack_dual = _find("_unpack_dual", "to read a tangent without a look-up at each call")
exit_dual_level = _find("_C._exit_dual_level", "to leave a level that an interrupt left open")
forward_mode_enabled = _find(
    "autograd.forward_ad._set_fwd_grad_enabled", "to build a graph of values without tangents"
)
preserve_versions = _find(
    "autograd._unsafe_preserve_version_counter",
    "to write to parameters for a while and leave no trace that autograd could object to",
)

# Tensor parallelism.
have_same_size = _find(
    "ops.aten._has_same_storage_numel.default", "to give a distributed tensor a tangent"
)

# Kernels that have no public name.
safe_softmax = _find("_safe_softmax", "for attention rows that a mask hides whole")
softmax_backward = _find("_softmax_backward_data", "as the forward derivative of a softmax")
attention_kernels = _find(
    "nn.attention._cur_sdpa_kernel_backends", "to put attention's kernels back after an interrupt"
)
set_attention_kernels = _find("nn.attention._sdpa_kernel", "to let only one kernel attend")
mkldnn_enabled = _find("_C._get_mkldnn_enabled", "to leave mkldnn's LSTM out, and it alone")
set_mkldnn_enabled = _find("_C._set_mkldnn_enabled", "to leave mkldnn's LSTM out, and it alone")

# Many tensors in one call; torch.optim builds on them too.
foreach_add_ = _find("_foreach_add_", "to move all parameters at once")
foreach_copy_ = _find("_foreach_copy_", "to copy all parameters at once")
foreach_lerp = _find("_foreach_lerp", "to get to a point between two ends of an update")
foreach_mul = _find("_foreach_mul", "to copy many small tensors at once")
foreach_mul_ = _find("_foreach_mul_", "to scale an update at once")
foreach_norm = _find("_foreach_norm", "to measure an update and its gradient at once")
foreach_sub = _find("_foreach_sub", "to get an update from its two ends at once")
unflatten_dense_tensors = _find(
    "_utils._unflatten_dense_tensors", "to copy parameters into one block of memory"
)

# What state a step is in.
current_graph_task = _find("_C._current_graph_task_id", "to know that a backward pass is under way")
current_node = _find("_C._current_autograd_node", "to walk the graph from a hook on a gradient")
run_backward = _find(
    "autograd.graph._engine_run_backward", "to find from a hook the losses of a backward pass"
)
is_executed = _find("_C._will_engine_execute_node", "to know whom a backward pass trains")
is_any_autocast_enabled = _find("_C._is_any_autocast_enabled", "to ask once, not for each device")
function_modes = _find("_C._len_torch_function_stack", "to leave modes that an interrupt left on")
pop_function_mode = _find("_C._pop_torch_function_stack", "to leave modes an interrupt left on")
DisableTorchFunction = _find(
    "_C.DisableTorchFunction", "to ask about tensors in a mode without other modes seeing it"
)

# Inside torch.func.vmap.
is_batched = _find("_C._functorch.is_batchedtensor", "to tell that a tensor stands for many")
get_unwrapped = _find("_C._functorch.get_unwrapped", "to see the tensor that holds all examples")
maybe_get_bdim = _find("_C._functorch.maybe_get_bdim", "to see which axis holds the examples")

# Trees of arguments; torch.utils has a public copy of none.
tree_flatten = _find("utils._pytree.tree_flatten", "to record a call's arguments")
tree_leaves = _find("utils._pytree.tree_leaves", "to look at a call's arguments")
tree_map = _find("utils._pytree.tree_map", "to look at a call's arguments")
tree_unflatten = _find("utils._pytree.tree_unflatten", "to make a call again")

# Private attributes of torch's objects: whose they are, and why.
ATTRIBUTES = {
    "_version": "Tensor: to notice that a tensor was changed in place",
    "_base": "Tensor: to tell a view, whose contents are another tensor's",
    "_indices": "sparse Tensor: indices as they are, coalesced or not",
    "_values": "sparse Tensor: values as they are, coalesced or not",
    "_is_zerotensor": "Tensor: torch's mark of a tangent that is zero",
    "_input_metadata": "autograd node: shape of a result that nobody holds",
    "_forward_cls": "node of a custom Function: the class that the user wrote",
    "_saved_dim": "autograd node: the axis of a softmax",
    "_saved_beta": "autograd node: the factor inside a softplus",
    "_buffers": "Module: to put copies of buffers in their place, and the originals back",
    "_parameters": "Module: to put back a parameter that a forward pass rebinds",
    "_modules": "Module: to walk modules without their named_ methods, at every step",
    "_backward_hooks": "Tensor and Module: to leave hooks on gradients out of a second gradient",
    "_backward_pre_hooks": "Module: to leave hooks on gradients out of a second gradient",
    "_current_level": "forward_ad: to leave levels that an interrupt left open",
    "_stance": "torch._dynamo.eval_frame: to know the stance that a re-run leaves",
    "_set_stance": "torch._dynamo.eval_frame: to go back to it, whatever interrupts the re-run",
    "_enabled": "autocast: to keep a model's own region switched off",
    "_get_backend": "ProcessGroup: to read the timeout of a group",
    "_timeout": "options of a backend: the timeout itself",
    "_join_config": "DistributedDataParallel: to know that ranks may run out of data",
    "_sharding_strategy": "flat parameter of FullyShardedDataParallel, where torch has it",
    "_get_root_mesh": "DeviceMesh: to tell which mesh a mesh is a slice of, where torch has it",
    "_get_fsdp_state": "module of fully_shard: the way to its reduce-scatter",
    "_fsdp_param_group": "state of fully_shard: the way to its reduce-scatter",
    "_reduce_scatter_comm": "group of fully_shard: its reduce-scatter, to listen to",
    "_FromTorchTensor": "torch.distributed.tensor: DTensor.from_local, to carry a tangent",
    "_ToTorchTensor": "torch.distributed.tensor: DTensor.to_local, to carry a tangent",
    "_op_dispatcher": "DTensor: to answer the size check of a tensor that gets a tangent",
    "_custom_op_handlers": "dispatcher of DTensor: the table that holds this answer",
    "_PipelineStageBase": "torch.distributed.pipelining.stage: to find the stages of a pipeline",
    "_get_ddp_logging_data": "DistributedDataParallel: to see another communication hook",
}
