"""A language model whose vocabulary, or sequence, is cut: ``parallel_vocabulary.py OUTPUT``.

Two ranks: beside the whole model, one whose logits stay cut along their classes under
``loss_parallel``, and one with sequence parallelism.
"""

import contextlib
import sys
from dataclasses import asdict

import torch
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from safestep import SafeStep


class LanguageModel(nn.Module):
    """An embedding, a residual block and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        return self.head(hidden + self.down(torch.tanh(self.up(self.norm(hidden)))))


def plan(mode):
    """Return how the layers are cut."""
    if mode == "vocabulary":
        head = ColwiseParallel(use_local_output=False)
        return {"up": ColwiseParallel(), "down": RowwiseParallel(), "head": head}
    whole, cut = Replicate(), Shard(1)
    return {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=cut),
        "norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=cut),
        "down": RowwiseParallel(output_layouts=cut),
        "head": ColwiseParallel(input_layouts=cut, output_layouts=whole),
    }  # fmt: skip


def train(mode, *, lr=0.02, **options):
    torch.manual_seed(0)
    model = LanguageModel()
    if mode != "whole":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        parallelize_module(model, mesh, plan(mode))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=False)
    reports = []
    with SafeStep(optimizer, model, **options) as guard:
        for _ in range(3):
            tokens, labels = torch.randint(12, (2, 4, 4))
            optimizer.zero_grad()
            with loss_parallel() if mode == "vocabulary" else contextlib.nullcontext():
                logits = model(tokens).flatten(0, 1)
                nn.functional.cross_entropy(logits, labels.flatten()).backward()
            optimizer.step()
            reports.append(asdict(guard.last))
    return reports


def main(rank, output):
    kinds = {
        "jvp": {"estimator": "jvp"}, "difference": {"estimator": "difference"}, "auto": {},
        "clipped": {"lr": 1.0}, "ahead": {"copy": False},
    }  # fmt: skip
    found = {
        mode: {name: train(mode, **options) for name, options in kinds.items()}
        for mode in ("whole", "vocabulary", "sequence")
    }
    torch.save(found, f"{output}/rank{rank}.pt")


if __name__ == "__main__":
    run(main, 2, sys.argv[1])
