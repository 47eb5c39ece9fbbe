"""Rank 1 has no guard, or ends early: ``lone_guard.py OUTPUT unguarded|ends``.

Rank 0 writes what it raised, and after how long.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from launch import run
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep


def main(rank, output, fault):
    ddp = DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    guard = SafeStep(optimizer, ddp) if rank == 0 or fault == "ends" else None
    for step in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(ddp(torch.randn(4, 3)), torch.arange(4) % 2)
        loss.backward()
        if fault == "ends" and step == 2 and rank == 1:
            os._exit(0)
        start, before = time.monotonic(), [param.clone() for param in ddp.parameters()]
        try:
            optimizer.step()
        except RuntimeError as error:
            found = {"error": str(error), "seconds": time.monotonic() - start}
            found["is_unmoved"] = all(map(torch.equal, before, ddp.parameters()))
            Path(output, f"rank{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        if guard is None:
            time.sleep(8)  # busy elsewhere
            os._exit(0)


if __name__ == "__main__":
    run(main, 2, *sys.argv[1:], timeout=40, group_timeout=timedelta(seconds=5))
