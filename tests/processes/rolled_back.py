"""Ranks that go back together: ``rolled_back.py OUTPUT``."""

import copy
import sys

import torch
from launch import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep

STEPS, BACK = 8, 4


def main(rank, output):
    found = {kind: rolled_back(rank, kind) for kind in ("DDP", "FSDP2")}
    found["one is due"] = one_is_due(rank)
    torch.save(found, f"{output}/rank{rank}.pt")


def made(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5))
    if kind == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model[0])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, optimizer, SafeStep(optimizer, model, **options)


def train(rank, parts, step, *, rate=None):
    model, optimizer, _ = parts
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
    if rate is not None:
        optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), torch.arange(8) % 5).backward()
    optimizer.step()


def checkpoint(parts):
    model, optimizer, guard = parts
    return copy.deepcopy((*get_state_dict(model, optimizer), guard.state_dict()))


def tensors(state):
    """Return every number of a checkpoint of model and optimizer, of this rank's part of each."""
    return [
        [value.to_local() if hasattr(value, "to_local") else value for value in _leaves(part)]
        for part in state[:2]
    ]


def _leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if isinstance(value, str) else [value]


def rolled_back(rank, kind):
    parts = made(kind, rollback=BACK, rollback_after=2)
    states, statuses = [], []
    for step in range(STEPS):
        # Before the first step there is no state yet, and torch would make a step to get one.
        states.append(checkpoint(parts) if step else None)
        # The rate of all jumps; the guard scales two steps, and goes back.
        train(rank, parts, step, rate=1e4 if step >= STEPS - 2 else None)
        statuses.append(parts[2].last.status)
    then = states[STEPS - BACK]
    found = {"then": tensors(then), "rolled back": tensors(checkpoint(parts))}
    resumed = made(kind)
    set_state_dict(
        *resumed[:2],
        model_state_dict=copy.deepcopy(then[0]),
        optim_state_dict=copy.deepcopy(then[1]),
    )
    resumed[2].load_state_dict(then[2])
    for step in range(20, 22):
        train(rank, parts, step)
        train(rank, resumed, step)
        statuses.append(parts[2].last.status)
    found["rolled back, then on"] = tensors(checkpoint(parts))
    found["resumed, then on"] = tensors(checkpoint(resumed))
    parts[2].detach()
    called = made(kind, rollback=BACK)
    for step in range(STEPS):
        train(rank, called, step)
    called[2].roll_back()
    found["called"] = tensors(checkpoint(called))
    return {**found, "statuses": statuses}


def one_is_due(rank):
    parts = made("DDP", rollback=3, rollback_after=2)
    for step in range(5):
        if step == 3:
            then = checkpoint(parts)
        train(rank, parts, step)
    if rank == 1:  # as after a step that only this rank could not scale
        parts[2]._rollback._in_a_row = 1
    train(rank, parts, 5, rate=1e4)
    after = tensors(checkpoint(parts))
    return {"status": parts[2].last.status, "after": after, "then": tensors(then)}


run(main, 2, sys.argv[1])
