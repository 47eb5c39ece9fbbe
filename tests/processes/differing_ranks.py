"""SafeStep on ranks that are not alike: ``differing_ranks.py OUTPUT``, on three ranks."""

import copy
import sys
import warnings
from collections import OrderedDict

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep, read_run

STEPS = 6


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))


def main(rank, output):
    pair = dist.new_group([0, 1])
    found = {
        "action": error(rank, action="monitor" if rank == 1 else "clip"),
        "limit": error(rank, max_normalized_step=0.5 if rank else 1.0),
        "copy": error(rank, copy=rank != 2),
        "estimator": error(rank, estimator="jvp" if rank == 0 else "auto"),
        "optimizer": error(rank, kind=torch.optim.SGD if rank == 2 else torch.optim.Adam),
        "shape": error(rank, width=9 if rank == 2 else 8, is_wrapped=False),
        "names": error(rank, is_renamed=rank == 2, is_wrapped=False),
        "resumed": error(rank, first_step=40 if rank == 1 else 0),
        "alike": error(rank),
        "joined": joined(rank, is_guarded=True),
        "joined, unguarded": joined(rank, is_guarded=False),
        "joined, then on": joined(rank, is_guarded=True, action="monitor", epochs=2),
        "joined, scaled": joined(rank, is_guarded=True, is_scaled=True),
        "joined, scaled, unguarded": joined(rank, is_guarded=False, is_scaled=True),
        "joined, none at first": joined(
            rank, is_guarded=True, action="monitor", epochs=2, batches=(0, 3, 2)
        ),
        "weights": drifted(rank, f"{output}/weights", size=1e-4),
        "one bit": drifted(rank, f"{output}/bit", size=0.0, interval=4),
        "clean": drifted(rank, f"{output}/clean"),
        "momentum": drifted(rank, f"{output}/momentum", size=1e-4, what="state", interval=4),
    }
    if rank < 2:
        found["two replicas"] = drifted(rank, f"{output}/two", size=1e-4, off=1, group=pair)
    torch.save(found, f"{output}/rank{rank}.pt")


def error(
    rank, *, kind=torch.optim.Adam, width=8, first_step=0, is_wrapped=True, is_renamed=False,
    **options,
):  # fmt: skip
    """Return what the first step of this rank raised."""
    model = network(width)
    if is_renamed:
        names = ("first", "middle", "last")
        model = nn.Sequential(OrderedDict(zip(names, model, strict=True)))
    optimizer = kind(model.parameters(), lr=0.01)
    wrapped = DistributedDataParallel(model) if is_wrapped else model
    try:
        with SafeStep(optimizer, wrapped, **options) as guard:
            guard.load_state_dict({**guard.state_dict(), "step": first_step})
            before = copy.deepcopy(model.state_dict())
            loss_of(wrapped, torch.randn(8, 6)).backward()
            optimizer.step()
    except ValueError as raised:
        is_same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return str(raised) if is_same else "the step was taken"
    return None


def joined(
    rank, *, is_guarded, epochs=1, batches=(4, 7, 5), is_scaled=False, **options
):  # fmt: skip
    """Train on as many batches; if scaled, the gradient of batch 5 overflows and is left out."""
    ddp = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=is_scaled)
    options = {"action": "monitor", **options}
    guard = SafeStep(optimizer, ddp, **options) if is_guarded else None
    generator = torch.Generator().manual_seed(rank)
    reports = []
    for _ in range(epochs):
        with ddp.join():
            for index in range(batches[rank]):
                optimizer.zero_grad()
                loss = loss_of(ddp, torch.randn(8, 6, generator=generator))
                is_spoiled = is_scaled and index == 5
                scaler.scale(loss * torch.inf if is_spoiled else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                reports.append((guard.last.step, guard.last.status) if guard else None)
    for _ in range(2 if epochs > 1 else 0):  # out of the context
        optimizer.zero_grad()
        loss_of(ddp, torch.randn(8, 6, generator=generator)).backward()
        optimizer.step()
        reports.append((guard.last.step, guard.last.status))
    if guard:
        guard.detach()
    has_hook = "join_hook" in vars(ddp)
    return {"after": ddp.module.state_dict(), "reports": reports, "has_hook": has_hook}


def drifted(rank, run_dir, *, size=None, off=2, what="weights", interval=None, group=None):
    """Train twelve steps; before the seventh, something of one rank moves."""
    model = network()
    ddp = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        guard = SafeStep(
            optimizer, ddp, run_dir=run_dir, process_group=group, replica_check_interval=interval
        )
        for step in range(12):
            if step == STEPS and rank == off and size is not None:
                move(model[0].weight, optimizer, what, size)
            optimizer.zero_grad()
            loss_of(ddp, torch.randn(8, 6, generator=generator)).backward()
            optimizer.step()
        guard.detach()
    dist.barrier(group)
    events = [e for e in read_run(run_dir).events if e["name"] == "worker"]
    texts = [str(w.message) for w in said if "replica" in str(w.message)]
    return {"events": events, "warnings": texts}


@torch.no_grad()
def move(weight, optimizer, what, size):
    tensor = weight if what == "weights" else optimizer.state[weight]["exp_avg"]
    if size:
        tensor.mul_(1 + size)
    else:  # too little for any norm, of a number that the update is far from
        tensor[0, 0] = torch.nextafter(tensor[0, 0], tensor[0, 0] + 1)


def loss_of(model, inputs):
    return nn.functional.cross_entropy(model(inputs), torch.arange(8) % 4)


if __name__ == "__main__":
    run(main, 3, sys.argv[1])
