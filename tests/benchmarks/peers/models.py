"""Small models for the tasks of bench_peers.py."""

from __future__ import annotations

import torch
from bench_step import Block
from torch import Tensor, nn


class ViT(nn.Module):
    """A Transformer over the 16 patches of 2 x 2 pixels of a digit."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.view(-1, 1, 8, 8)).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def cnn() -> nn.Module:
    """Return a small network of convolutions and BatchNorm for the digits."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))
