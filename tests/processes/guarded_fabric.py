"""SafeStep in a Fabric loop, rank by rank: ``guarded_fabric.py OUTPUT``."""

import copy
import sys
from dataclasses import asdict

import torch
import torch._dynamo  # noqa: F401  once before the fork, not in every rank
from lightning.fabric import Fabric
from torch import nn

from safestep import SafeStep

STEPS = 4


def train(fabric, *, lr, action, accumulated=1, dropout=0.0):
    """Train a few steps and return what this rank saw; action None is without a guard."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 4)
    )
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=lr))
    guard = SafeStep(optimizer, model, action=action) if action else None
    torch.manual_seed(100 + fabric.global_rank)
    steps, reports = [], []
    for _ in range(STEPS):
        batches = [torch.randn(8, 6) for _ in range(accumulated)]
        optimizer.zero_grad()
        for inputs in batches:
            with fabric.no_backward_sync(model, enabled=inputs is not batches[-1]):
                fabric.backward(nn.functional.cross_entropy(model(inputs), torch.arange(8) % 4))
        before = copy.deepcopy(net.state_dict())
        optimizer.step()
        steps.append((before, copy.deepcopy(net.state_dict()), torch.cat(batches)))
        reports += [asdict(guard.last)] if guard else []
    return {"steps": steps, "reports": reports, "after": net.state_dict()}


def scenarios(fabric):
    watched = {"lr": 0.05, "accumulated": 2, "dropout": 0.2}
    return {
        "clipped": train(fabric, lr=3.0, action="clip"),
        "watched": train(fabric, action="monitor", **watched),
        "unguarded": train(fabric, action=None, **watched),
    }


def main(output):
    torch.set_num_threads(1)
    alone = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(
        lambda fabric: torch.save(scenarios(fabric), f"{output}/rank{fabric.global_rank}.pt")
    )
    torch.save(scenarios(alone), f"{output}/alone.pt")


if __name__ == "__main__":
    main(sys.argv[1])
