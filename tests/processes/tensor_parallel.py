"""SafeStep where ranks hold pieces of each layer: ``tensor_parallel.py OUTPUT NUM_RANKS``.

On two ranks tensor parallelism alone, on four also within DistributedDataParallel and fully_shard.
"""

import sys
from dataclasses import asdict

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
    torch.save(found, f"{output}/rank{rank}.pt")


def distributed(mode):
    torch.manual_seed(0)
    model = Net()
    if mode == "whole":
        return model
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if mode == "fsdp":
        fully_shard(model, mesh=mesh["data"])
    if mode == "ddp":
        _pre_dp_module_transform(model)
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
