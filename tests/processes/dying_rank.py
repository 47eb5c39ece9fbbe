"""Rank 1 dies before its second record: ``dying_rank.py OUTPUT``. Rank 0 writes how it ended."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from launch import run
from torch.nn.parallel import DistributedDataParallel

from safestep.workers.metrics import WorkerMetrics


def main(rank, output):
    ddp = DistributedDataParallel(torch.nn.Linear(3, 2))
    metrics = WorkerMetrics(ddp)
    for step in range(2):
        loss = ddp(torch.ones(4, 3)).sum()
        loss.backward()
        if step and rank == 1:
            os._exit(0)
        start = time.monotonic()
        try:
            metrics.record(loss)
        except RuntimeError:
            Path(output, "raised").write_text(str(time.monotonic() - start))
            os._exit(0)


if __name__ == "__main__":
    run(main, 2, sys.argv[1], timeout=20, group_timeout=timedelta(seconds=5))
