"""SafeStep where ranks hold pieces of each layer: ``tensor_parallel.py OUTPUT NUM_RANKS``.

On two ranks tensor parallelism alone, on four also within DistributedDataParallel and fully_shard.
"""

import sys
import warnings
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep


class Net(nn.Module):
    """A residual block of which two layers are cut into pieces, and two are not."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, inputs):
        return self.head(inputs + self.down(torch.tanh(self.up(self.norm(inputs)))))


class First(Net):
    """Layers that are cut from the first on, the weight of the first frozen."""

    def __init__(self):
        super().__init__()
        self.norm = None
        self.up.weight.requires_grad_(False)

    def forward(self, inputs):
        return self.head(self.down(torch.tanh(self.up(inputs))))


def main(rank, output):
    modes = ["tensor"] + ["ddp", "fsdp"] * (dist.get_world_size() > 2)
    found = {}
    for mode in ["whole", *modes]:
        found[mode] = {
            "measured": train(mode, lr=0.01, action="monitor"),
            "unguarded": train(mode, lr=0.01),
            "secant": train(mode, lr=0.01, action="monitor", estimator="secant"),
            "clipped": train(mode, lr=3.0, action="clip"),
            "skipped": train(mode, lr=0.01, action="clip", spoiled=1),
            "ahead": train(mode, lr=3.0, action="clip", copy=False),
        }
        if mode != "whole":
            found[mode]["float64"] = beside_float64(mode, f"{output}/{mode}")
    torch.save(found, f"{output}/rank{rank}.pt")


def beside_float64(mode, run_dir):
    """Return r, from whatever estimator there is, of steps of SGD, and r by a dense Jacobian.

    The first layer is cut, so what enters it has no tangent, and its weight is frozen.
    """
    whole, model = distributed("whole", First).double(), distributed(mode, First)
    names = [name for name, param in whole.named_parameters() if param.requires_grad]
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False)
    generator = torch.Generator().manual_seed(0)
    reports, expected = [], []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with SafeStep(
            optimizer, model, action="monitor", estimator="jvp", run_dir=run_dir
        ) as guard:
            for _ in range(3):
                inputs = torch.randn(8, 6, generator=generator)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), torch.arange(8) % 5).backward()
                optimizer.step()
                reports.append(asdict(guard.last))
                expected.append(step_of(whole, names, inputs.double()))
    texts = [str(each.message) for each in said if "SafeStep" in str(each.message)]
    return {"reports": reports, "expected": expected, "warnings": texts}


def step_of(whole, names, inputs):
    """Take a step of SGD on the whole model, and return its r."""
    params = {name: param for name, param in whole.named_parameters() if name in names}
    logits = partial(torch.func.functional_call, whole, args=(inputs,))
    loss = nn.functional.cross_entropy(logits(params), torch.arange(8) % 5)
    gradients = torch.autograd.grad(loss, list(params.values()))
    jacobian = torch.func.jacrev(logits)(params)  # 8 x 5 x the parameter's shape
    change = sum(
        torch.tensordot(jacobian[name], -0.1 * gradient, gradient.ndim)
        for name, gradient in zip(names, gradients, strict=True)
    )
    with torch.no_grad():
        for param, gradient in zip(params.values(), gradients, strict=True):
            param -= 0.1 * gradient
    return float((change.amax(1) - change.amin(1)).amax() / torch.pi)


def distributed(mode, kind=Net):
    torch.manual_seed(0)
    model = kind()
    if mode == "whole":
        return model
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if mode == "fsdp":
        fully_shard(model, mesh=mesh["data"])
    if mode == "ddp":
        frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
        _pre_dp_module_transform(model)  # it forgets what is frozen
        for name, param in model.named_parameters():
            param.requires_grad_(name not in frozen)
        return DistributedDataParallel(model, process_group=mesh["data"].get_group())
    return model


def train(mode, *, lr, action=None, spoiled=None, **options):
    """Train three steps on the same data everywhere."""
    model = distributed(mode)
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr=lr, foreach=False)
    guard = SafeStep(optimizer, model, action=action, **options) if action else None
    generator = torch.Generator().manual_seed(0)
    reports = []
    for step in range(3):
        inputs = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), torch.arange(8) % 5)
        (loss * (torch.nan if step == spoiled else 1.0)).backward()
        optimizer.step()
        reports += [asdict(guard.last)] if guard else []
    if guard:
        guard.detach()
    after = [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in params]
    logits = model(torch.randn(8, 6, generator=generator)).detach()
    return {"reports": reports, "after": [p.clone() for p in after], "logits": logits}


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
