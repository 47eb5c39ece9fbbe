"""SafeStep on DistributedDataParallel, rank by rank: ``guarded_ranks.py OUTPUT NUM_RANKS``."""

import contextlib
import copy
import sys

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep

STEPS = 3


class Net(nn.Module):
    """A classifier with BatchNorm, dropout, a branch that may stay unused, and a planted fault."""

    is_again = False  # of the class: a re-run finds the attributes of the module as they were

    def __init__(self, *, dropout=0.0, fault=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh())
        self.drop = nn.Dropout(dropout)
        self.branch = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)
        self.fault = fault

    def forward(self, inputs, use_branch=True):
        hidden = self.drop(self.body(inputs))
        logits = self.head(hidden + self.branch(hidden) if use_branch else hidden)
        if not self.is_again:
            return logits
        has_tangent = forward_ad.unpack_dual(self.head.weight).tangent is not None
        if self.fault == "raises" or (self.fault == "secant raises" and not has_tangent):
            raise KeyError("labels are gone")
        return logits * torch.nan if self.fault == "not finite" else logits


def main(rank, output):
    found = {
        "clipped": train(rank, lr=5.0),
        "held": train(rank, lr=5.0, num_steps=6, sufficient_decrease=0.0),
        "skipped": train(rank, lr=0.01, spoiled=1),
        "raises": train(rank, lr=0.01, faulty=1, fault="raises"),
        "raises while clipped": train(rank, lr=5.0, faulty=1, fault="raises"),
        "not finite": train(rank, lr=0.01, faulty=1, fault="not finite"),
        "blind": train(rank, lr=0.01, faulty=rank, fault="raises"),
        "predicted": train(rank, lr=1e-4, num_steps=40, quiet=1),
        "secant raises": train(rank, lr=0.3, num_steps=60, faulty=1, fault="secant raises"),
        "secants": train(rank, lr=0.3, num_steps=60),
        "subgroup": train(rank, lr=5.0, group=dist.new_group(list(range(dist.get_world_size())))),
    }
    for name, options in {
        "plain": {},
        "find_unused_parameters": {"find_unused_parameters": True, "use_branch": False},
        "static_graph": {"static_graph": True},
        "bucket views": {"gradient_as_bucket_view": True},
        "accumulated": {"accumulated": 2},
    }.items():
        options = {"lr": 0.1, "dropout": 0.2, **options}
        found[name] = train(rank, action="monitor", **options)
        found[name]["unguarded"] = train(rank, is_guarded=False, **options)["after"]
    torch.save(found, f"{output}/rank{rank}.pt")


def train(rank, *, faulty=None, fault=None, dropout=0.0, **options):
    """Train a few steps and return what this rank saw."""
    torch.manual_seed(0)
    model = Net(dropout=dropout, fault=fault if rank == faulty else None)
    torch.manual_seed(100 + rank)
    return _train(rank, model, **options)


def _train(
    rank, model, *, lr, action="clip", is_guarded=True, group=None, accumulated=1, spoiled=None,
    use_branch=True, num_steps=STEPS, quiet=None, sufficient_decrease=None, **ddp,
):  # fmt: skip
    wrapped = DistributedDataParallel(model, process_group=group, **ddp)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=lr)
    guard = None
    if is_guarded:
        guard = SafeStep(
            optimizer, wrapped, action=action, process_group=group,
            sufficient_decrease=sufficient_decrease,
        )  # fmt: skip
    reports, steps = [], []
    for step in range(num_steps):
        optimizer.zero_grad()
        batches = [torch.randn(8, 6) for _ in range(accumulated)]
        if spoiled == rank and step == 1:
            batches[0][0] = torch.nan
        for inputs in batches:
            is_last = inputs is batches[-1]
            with contextlib.nullcontext() if is_last else wrapped.no_sync():
                logits = wrapped(inputs, use_branch) if not use_branch else wrapped(inputs)
                loss = nn.functional.cross_entropy(logits, torch.arange(8) % 4)
                if quiet == rank:  # what jumps there is nothing in the gradient of all
                    loss = loss * (0.05 if step == 30 else 0.01)
                loss.backward()
        before = copy.deepcopy(model.state_dict())
        Net.is_again = True
        optimizer.step()
        Net.is_again = False
        steps.append((before, copy.deepcopy(model.state_dict()), torch.cat(batches)))
        reports.append(guard.last if guard else None)
    return {"reports": reports, "steps": steps, "after": model.state_dict()}


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
