"""Rank 1 fails where ranks compute logits together: ``raising_piece.py OUTPUT FAULT``, two ranks.

Faults: it has recorded no call ("calls"), it raises when the model runs again, before the ranks
wait for each other ("before") or after ("after"), or each rank raises in forward mode ("forward").
Each rank writes for every step how long it took, and its report or what was raised.
"""

import json
import os
import sys
import time
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from launch import run
from tensor_parallel import Net, distributed
from torch import nn
from torch.autograd import forward_ad

from safestep import SafeStep

FAULTY = 1  # the step


class Faulty(Net):
    """Raises on rank 1 when a guard runs it again, at one step; or everywhere in forward mode."""

    step, rank, fault = 0, 0, ""

    def forward(self, inputs):
        is_again = not torch.is_grad_enabled() and self.step == FAULTY and self.rank == 1
        if is_again and self.fault == "before":
            raise RuntimeError("labels are gone")
        if self.fault == "forward" and forward_ad._current_level >= 0:
            raise RuntimeError("no derivative")
        logits = super().forward(inputs)
        if is_again and self.fault == "after":
            raise RuntimeError("labels are gone")
        return logits


def main(rank, output, fault):
    warnings.simplefilter("ignore")
    model = distributed("tensor", Faulty)
    model.rank, model.fault = rank, fault
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)
    guard = SafeStep(optimizer, model, estimator="jvp", action="monitor")
    found = []
    for step in range(4):
        model.step = step
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 5).backward()
        if (fault, step, rank) == ("calls", FAULTY, 1):
            guard.forget()
        params = [param.to_local() if hasattr(param, "to_local") else param
                  for param in model.parameters()]  # fmt: skip
        before, begin, error = [param.clone() for param in params], time.monotonic(), None
        try:
            optimizer.step()
        except RuntimeError as raised:
            error = str(raised)
        entry = {"seconds": time.monotonic() - begin, "error": error}
        entry["is_unmoved"] = all(map(torch.equal, before, params))
        found.append({**entry, **({} if error else asdict(guard.last))})
        if error:
            break
    Path(output, f"rank{rank}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    run(main, 2, *sys.argv[1:], timeout=90, group_timeout=timedelta(seconds=5))
