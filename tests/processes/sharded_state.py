"""SafeStep on ZeroRedundancyOptimizer, whose state is spread over ranks: ``... OUTPUT RANKS``."""

import copy
import math
import sys
import warnings

import torch
from launch import run
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep

warnings.simplefilter("ignore")  # torch deprecates what it imports here
from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: E402


def main(rank, output):
    seen = {}
    for is_guarded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3
        )
        guard = SafeStep(optimizer, parallel) if is_guarded else None

        def step(seed, spoil=1.0, optimizer=optimizer, parallel=parallel):
            generator = torch.Generator().manual_seed(100 * seed + rank)
            inputs = torch.randn(6, 5, generator=generator)
            targets = torch.randint(3, (6,), generator=generator)
            optimizer.zero_grad()
            (cross_entropy(parallel(inputs), targets) * spoil).backward()
            optimizer.step()
            return inputs

        for seed in range(10):
            step(seed)
        seen[is_guarded] = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.optim.state_dict())
    step(10, math.nan)
    seen["skipped"] = guard.last.status, copy.deepcopy(model.state_dict())
    seen["state"] = state, copy.deepcopy(optimizer.optim.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 100.0
    inputs = step(11)
    seen["clipped"] = guard.last.status, copy.deepcopy(model.state_dict()), inputs
    torch.save(seen, f"{output}/rank{rank}.pt")


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
