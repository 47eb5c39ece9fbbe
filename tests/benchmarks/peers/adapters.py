"""LoRA on the character GPT, which is trained here on source text and adapted to prose."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch
from bench_step import GPT, Shape, _text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .data import language

PRETRAINING_STEPS = 600


class LoRA(nn.Module):
    """A frozen linear layer plus a trained one of low rank, zero at first (arXiv:2106.09685)."""

    def __init__(self, frozen: nn.Linear, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.frozen, self.scale = frozen.requires_grad_(False), scale
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * self.up(self.down(x))


def adapted_gpt() -> nn.Module:
    """Return the trained GPT with LoRA in place of each linear layer of its blocks."""
    model = deepcopy(_trained_gpt()).requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.out = LoRA(block.qkv), LoRA(block.out)
        block.mlp[0], block.mlp[2] = LoRA(block.mlp[0]), LoRA(block.mlp[2])
    return model


@cache
def _trained_gpt() -> GPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(Shape(4, 32, 2, 128))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
        batch, generator = language(_text, 4096), torch.Generator().manual_seed(0)
        for _ in range(PRETRAINING_STEPS):
            inputs, targets = batch(generator)
            optimizer.zero_grad()
            cross_entropy(model(inputs).flatten(0, -2), targets).backward()
            optimizer.step()
    return model
