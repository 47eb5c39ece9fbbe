"""SafeStep on parameters that fully_shard distributes: ``guarded_shards.py OUTPUT NUM_RANKS``."""

import sys
from dataclasses import asdict

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)

from safestep import SafeStep

STEPS = 5
# What happens in a longer run: every rank's learning rate jumps, or the loss of the last rank does.
JUMP, OUTLIER = 35, 50


def network():
    """Return a classifier with a sharded block of its own, of sizes that do not divide."""
    block = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(0.0))
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), block, nn.Linear(7, 5, bias=False))


def main(rank, output):
    watched = {"lr": 0.01, "action": "monitor"}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    found = {
        "clipped": train(rank, lr=3.0),
        "secant": train(rank, lr=0.01, estimator="secant"),
        "difference": train(rank, lr=0.01, estimator="difference"),
        "auto": train(rank, lr=0.01, estimator="auto"),
        "predicted": train(rank, lr=1e-4, estimator="auto", num_steps=60),
        "secants": train(rank, lr=0.2, estimator="auto", num_steps=60, limit=0.25),
        "skipped": train(rank, lr=0.01, spoiled=1),
        "watched": train(rank, **watched),
        "unguarded": train(rank, lr=0.01, action=None),
        "bfloat16": train(rank, **watched, mp_policy=half),
        "kept": train(rank, **watched, reshard_after_forward=False),
        "replicated": train(rank, **watched, num_replicas=2),
        "replicated, clipped": train(rank, lr=3.0, num_replicas=2),
        "accumulated": train(rank, **watched, num_batches=2),
        "ahead": train(rank, **watched, copy=False),
        "ahead-secant": train(rank, lr=0.01, estimator="secant", copy=False),
        "ahead-clipped": train(rank, lr=3.0, copy=False),
        "ahead-skipped": train(rank, lr=0.01, spoiled=1, copy=False),
        "weighed": train(rank, **watched, is_padded=True),
        "flattened": flattened(),
    }
    torch.save(found, f"{output}/rank{rank}.pt")


def train(
    rank, *, lr, action="clip", estimator="jvp", spoiled=None, num_replicas=None, num_batches=1,
    copy=True, is_padded=False, num_steps=STEPS, limit=1.0, **sharding,
):  # fmt: skip
    torch.manual_seed(0)
    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if num_replicas is not None:
        shape = (num_replicas, dist.get_world_size() // num_replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    fully_shard(model[2], mesh=mesh, **sharding)
    fully_shard(model, mesh=mesh, **sharding)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    options = {"action": action, "estimator": estimator, "copy": copy}
    options["max_normalized_step"] = limit
    guard = SafeStep(optimizer, model, **options) if action else None
    generator = torch.Generator().manual_seed(rank)
    steps, reports = [], []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 1e4 * lr if step == JUMP else lr
        inputs = torch.randn(8 * num_batches, 6, generator=generator)
        is_outlier = step == OUTLIER and rank == dist.get_world_size() - 1
        inputs[:8] *= num_batches  # the first of several has the longest rows
        if spoiled == rank and step == 1:
            inputs[0] = torch.nan
        optimizer.zero_grad()
        for index, batch in enumerate(inputs.split(8)):
            model.set_requires_gradient_sync(index == num_batches - 1)
            if is_padded and guard:
                guard.record(padded_loss, model, batch)
            loss = padded_loss if is_padded else plain_loss
            (loss(model, batch) * (20 if is_outlier else 1)).backward()
        before = gathered(model)
        optimizer.step()
        steps.append((before, gathered(model), inputs))
        reports += [asdict(guard.last)] if guard else []
    moments = [v.full_tensor() for s in optimizer.state.values() for v in (s["exp_avg_sq"],)]
    return {"steps": steps, "reports": reports, "moments": moments}


def plain_loss(model, batch):
    return nn.functional.cross_entropy(model(batch), torch.arange(8) % 5)


def padded_loss(model, batch):
    """Return the loss of the batch, computed with rows that are longer and weigh nothing."""
    labels, weight = torch.arange(16) % 5, (torch.arange(16) < 8).float()
    logits = model(torch.cat((batch, 10 * batch)))
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return (losses * weight).sum() / weight.sum()


def flattened():
    """Return reports and logits of a whole model, and of ones that the older wrapper flattened."""
    cpu = {"device_id": torch.device("cpu"), "use_orig_params": True}
    found = {}
    for name in ("whole", "all", "hybrid"):
        torch.manual_seed(0)
        model = network()
        if name == "all":
            model[2] = FullyShardedDataParallel(model[2], **cpu)
        if name != "whole":
            strategy = ShardingStrategy.NO_SHARD if name == "hybrid" else None
            model = FullyShardedDataParallel(model, sharding_strategy=strategy, **cpu)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        guard = SafeStep(optimizer, model)
        reports = []
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 3.0 if step == 2 else 0.01
            optimizer.zero_grad()
            loss = plain_loss(model, torch.randn(8, 6))
            (loss * (torch.nan if step == 1 else 1.0)).backward()
            optimizer.step()
            reports.append(asdict(guard.last))
        guard.detach()
        found[name] = {"reports": reports, "logits": model(torch.ones(2, 6)).detach()}
    return found


def gathered(model):
    whole = {name: param.detach().full_tensor() for name, param in model.named_parameters()}
    return {name: param.clone() for name, param in whole.items()}


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
