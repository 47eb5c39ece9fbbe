"""Replicas of shards, on four ranks: ``replicated_shards.py OUTPUT [STEPS]``.

With STEPS, only count the events of that many clean steps.
"""

import sys
import warnings
from dataclasses import asdict

import torch
import torch.distributed as dist
from launch import run
from tensor_parallel import distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from safestep import SafeStep, read_run

STEPS, MOVED = 10, 6  # before which something of one rank moves
CLEAN = {
    "clean": {},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    "accumulated": {"num_batches": 2},
    "clipped gradients": {"max_norm": 0.1},
}


def main(rank, output, num_steps):
    if num_steps:
        found = {name: train(rank, f"{output}/{name}", num_steps=num_steps, **options)
                 for name, options in CLEAN.items()}  # fmt: skip
    else:
        found = {
            "clean": train(rank, f"{output}/clean", interval=3),
            "weights": train(rank, f"{output}/weights", moved=1e-4),
            "state": train(rank, f"{output}/state", moved=1e-4, what="state", interval=4),
            "one bit": train(rank, f"{output}/bit", moved=0.0, interval=4),
            "majority": train(rank, f"{output}/four", shape=(4, 1), moved=1e-4),
            "another start": train(rank, f"{output}/start", seed=rank // 2),
            "pieces": train(rank, f"{output}/pieces", kind="pieces", moved=1e-4, interval=4),
            "stage": train(rank, f"{output}/stage{rank // 2}", kind="stage"),
            "whole": train(rank, f"{output}/whole{rank}", kind="whole"),
        }
    torch.save(found, f"{output}/rank{rank}.pt")


def train(rank, run_dir, *, kind="shards", moved=None, what="weights", interval=None, seed=0,
          num_steps=STEPS, num_batches=1, max_norm=None, shape=(2, 2), **sharding):  # fmt: skip
    """Train with the same data on all ranks where these hold no replicas, and rank 3 may move."""
    torch.manual_seed(seed)
    group = None
    if kind == "pieces":
        model = distributed("ddp")
    else:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    if kind == "shards":
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for module in (model[0], model):
            fully_shard(module, mesh=mesh, **sharding)
    if kind == "stage":  # each on its own
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("stage", "shard"))["shard"]
        fully_shard(model, mesh=mesh)
        group = mesh.get_group()
    if kind == "whole":
        group = [dist.new_group([each]) for each in range(4)][rank]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    generator = torch.Generator().manual_seed(0 if kind in {"stage", "whole", "pieces"} else rank)
    reports = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        guard = SafeStep(
            optimizer, model, run_dir=run_dir, replica_check_interval=interval, process_group=group
        )
        for step in range(num_steps):
            if step == MOVED and rank == 3 and moved is not None:
                move(model, optimizer, what, moved)
            optimizer.zero_grad()
            for index in range(num_batches):
                if kind == "shards":
                    model.set_requires_gradient_sync(index == num_batches - 1)
                logits = model(torch.randn(8, 6, generator=generator))
                loss = nn.functional.cross_entropy(logits.float(), torch.arange(8) % 5)
                (loss / num_batches).backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            reports.append(asdict(guard.last))
        guard.detach()
    dist.barrier()
    events = [e for e in read_run(run_dir).events if e["name"] == "worker"]
    texts = [str(w.message) for w in said if "replica" in str(w.message)]
    return {"events": events, "warnings": texts, "reports": reports}


@torch.no_grad()
def move(model, optimizer, what, size):
    weight = next(param for param in model.parameters() if param.ndim == 2)
    tensor = weight if what == "weights" else optimizer.state[weight]["exp_avg"]
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if size:
        tensor.mul_(1 + size)
    else:  # too little for any norm
        tensor[0, 0] = torch.nextafter(tensor[0, 0], tensor[0, 0] + 1)


if __name__ == "__main__":
    run(main, 4, sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0, timeout=500)
