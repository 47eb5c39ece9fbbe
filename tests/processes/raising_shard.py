"""Rank 1 raises between two all-gathers of a re-run: ``raising_shard.py OUTPUT``.

Each rank writes how long its optimizer step took, and what that raised.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from launch import run
from torch import nn
from torch.distributed.fsdp import fully_shard

from safestep import SafeStep


class Raises(nn.Module):
    """Passes its input on while training; raises on rank 1 when a guard runs it again."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def forward(self, inputs):
        if self.rank == 1 and not torch.is_grad_enabled():
            raise KeyError("labels are gone")
        return inputs


def main(rank, output):
    torch.manual_seed(0)
    first, second = nn.Linear(6, 7), nn.Linear(7, 5)
    model = nn.Sequential(first, Raises(rank), second)
    for module in (first, second, model):
        fully_shard(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SafeStep(optimizer, model)
    nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 5).backward()
    start, found = time.monotonic(), {}
    try:
        optimizer.step()
    except RuntimeError as error:
        found["error"] = str(error)
    found["seconds"] = time.monotonic() - start
    Path(output, f"rank{rank}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    run(main, 2, sys.argv[1], timeout=60, group_timeout=timedelta(seconds=5))
