"""Ranks that run a batch again, of which one has a fault: ``second_run.py OUTPUT``."""

import sys

import torch
from launch import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep

left = 0  # outside every module: a re-run does not put it back


class Flaky(nn.Module):
    def forward(self, inputs):
        global left
        left -= 1
        return inputs * 100 if left >= 0 else inputs


def main(rank, output):
    found = {kind: train(rank, kind) for kind in ("DDP", "FSDP2")}
    model, optimizer, guard = made("DDP", run_dir=f"{output}/log", keep_batches=1)
    inputs = step(rank, model, optimizer)
    found |= {"inputs": inputs, "file": guard.last.reason.split()[-1]}
    found["run"] = guard.state_dict()["run"]
    torch.save(found, f"{output}/rank{rank}.pt")


def made(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), Flaky())
    if kind == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model[0])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e3)
    return model, optimizer, SafeStep(optimizer, model, **options)


def step(rank, model, optimizer):
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(rank))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), torch.arange(8) % 5).backward()
    optimizer.step()
    return inputs


def train(rank, kind):
    global left
    model, optimizer, guard = made(kind)
    seen = []
    for count in (0, rank):  # in the second step, rank 1 has a fault
        left = count
        step(rank, model, optimizer)
        seen.append((guard.last.status, guard.last.second_run))
    guard.detach()
    return seen


run(main, 2, sys.argv[1])
