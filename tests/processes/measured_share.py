"""How many steps "auto" measures under DistributedDataParallel: ``measured_share.py OUTPUT N``."""

import json
import sys

import torch
from launch import run
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep

STEPS = 300


def main(rank, output):
    """Train on batches that each rank draws itself, and note how every step was estimated."""
    torch.manual_seed(0)
    inputs, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)
    generator = torch.Generator().manual_seed(rank)
    estimators = []
    for _ in range(STEPS):
        batch = torch.randint(len(inputs), (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch].float() / 16), labels[batch]).backward()
        optimizer.step()
        estimators.append(guard.last.estimator)
    with open(f"{output}/rank{rank}.json", "w") as file:
        json.dump(estimators, file)


if __name__ == "__main__":
    run(main, int(sys.argv[2]), sys.argv[1])
