"""Count what ranks ask each other in a step: ``asking_ranks.py OUTPUT NUM_RANKS``."""

import json
import sys
import warnings
from pathlib import Path

import torch
from launch import run
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.host_reads import Collectives

LABELS = torch.arange(16) % 5


def counted(loss, steps=32, **options):
    """Return of each step how it was measured, and the collectives in it."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5)
    ddp = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4, fused=True)
    guard, found = SafeStep(optimizer, ddp, **options), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(ddp(torch.randn(16, 6))).backward()
        with Collectives() as seen:
            optimizer.step()
        found.append((guard.last.estimator, seen.asked))
    guard.detach()
    return found[1:]  # before the first step, ranks compare how they were set up


def main(rank, output):
    warnings.simplefilter("ignore")
    found = {
        "auto": counted(lambda outputs: cross_entropy(outputs, LABELS)),
        "jvp": counted(lambda outputs: cross_entropy(outputs, LABELS), 4, estimator="jvp"),
        "squares": counted(lambda outputs: outputs.square().mean()),
    }
    Path(output, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
