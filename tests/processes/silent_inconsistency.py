"""Seeds that differ between ranks, on four real ranks: ``silent_inconsistency.py OUTPUT``.

The settings S1 of "Silent Inconsistency in Data-Parallel Full Fine-Tuning" (arXiv 2602.14462): all
ranks have one seed, one rank has another, every rank has its own. The seed sets the order of the
data and dropout, and is set after the process group exists. Each setting is run with two ways to
give ranks their data: each shuffles the whole data ("own"), or a DistributedSampler deals one
permutation out to the ranks ("dealt"). A small byte-level GPT, trained on one module of Python's
standard library, is tuned on the source of another.
"""

import argparse
import inspect
import json
import sys
from itertools import count, islice
from pathlib import Path

import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from safestep.workers.metrics import WorkerMetrics

RANKS, STEPS, PRETRAINING_STEPS = 4, 80, 100
LENGTH, BATCH, WIDTH = 48, 8, 48
SEEDS = {"S1-1": [0, 0, 0, 0], "S1-2": [0, 0, 0, 1], "S1-3": [0, 1, 2, 3]}


class ByteModel(nn.Module):
    """Two pre-norm Transformer layers on bytes, with dropout."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(128, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        options = {"dropout": 0.1, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **options) for _ in range(2)
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens):
        hidden = self.tokens(tokens) + self.places
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        return self.head(hidden)


def windows(module):
    """Return the module's source in windows of LENGTH + 1 bytes."""
    source = inspect.getsource(module).encode("ascii", "replace")
    tokens = torch.tensor(list(source))
    return TensorDataset(tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))


def loss_on(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batches_of(loader):
    """Yield batches for ever; a DistributedSampler needs to be told the epoch."""
    for epoch in count():
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for (tokens,) in loader:
            yield tokens


def pretrained():
    """Return the model after a little training, the same on every rank."""
    torch.manual_seed(0)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(windows(argparse), BATCH, shuffle=True)
    for tokens in islice(batches_of(loader), PRETRAINING_STEPS):
        optimizer.zero_grad()
        loss_on(model, tokens).backward()
        optimizer.step()
    return model.state_dict()


def tune(rank, weights, seed, way):
    """Return the reports of one setting."""
    model = ByteModel()
    model.load_state_dict(weights)
    ddp = DistributedDataParallel(model)
    torch.manual_seed(seed)
    data = windows(inspect)
    sampler = (
        DistributedSampler(data, RANKS, rank, seed=seed)
        if way == "dealt"
        else RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    )
    metrics = WorkerMetrics(ddp, pairwise_every=1)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    reports = []
    for tokens in islice(batches_of(DataLoader(data, BATCH, sampler=sampler)), STEPS):
        loss = loss_on(ddp, tokens)
        optimizer.zero_grad()
        loss.backward()
        reports.append(metrics.record(loss))
        optimizer.step()
    metrics.detach()
    return reports


def main(rank, output):
    shared = [pretrained()] if rank == 0 else [None]
    dist.broadcast_object_list(shared)
    found = {}
    for way in ("own", "dealt"):
        for name, seeds in SEEDS.items():
            reports = tune(rank, shared[0], seeds[rank], way)
            found[f"{way} {name}"] = {
                "loss": [report.loss for report in reports],
                "loss_std": [report.loss_std for report in reports],
                "grad_norm_std": [report.grad_norm_std for report in reports],
                "pairwise_cosine": [report.pairwise_cosine for report in reports],
                "events": [event.message for report in reports for event in report.events],
            }
    if rank == 0:
        Path(output, "silent.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(main, RANKS, sys.argv[1], timeout=500)
