"""Rank 1 dies before its second step ends: ``dying_rank.py OUTPUT metrics|guard``.

Rank 0 writes how long it waited for an error.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from launch import run
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep
from safestep.workers.metrics import WorkerMetrics


def main(rank, output, watcher):
    ddp = DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    metrics = WorkerMetrics(ddp) if watcher == "metrics" else None
    if watcher == "guard":
        SafeStep(optimizer, ddp)
    for step in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(ddp(torch.randn(4, 3)), torch.arange(4) % 2)
        loss.backward()
        if step and rank == 1:
            os._exit(0)
        start = time.monotonic()
        try:
            metrics.record(loss) if metrics else optimizer.step()
        except RuntimeError:
            Path(output, "raised").write_text(str(time.monotonic() - start))
            os._exit(0)


if __name__ == "__main__":
    run(main, 2, *sys.argv[1:], timeout=20, group_timeout=timedelta(seconds=5))
