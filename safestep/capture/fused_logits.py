"""Logits of a fused loss over many classes, in tiles that are computed on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from safestep.radius.masking import stand_in

# Logits in one tile of a linear_cross_entropy: 24 MiB in float32. With fewer rows, a product takes
# longer per row.
TILE_ELEMENTS = 6 << 20
BLOCK_ELEMENTS = 1 << 17  # 512 KiB in float32
_MAPPED_BYTES = 33 << 20  # glibc always maps allocations over 32 MiB


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Some rows of the logits of a linear_cross_entropy, which are never all in memory.

    Attributes:
        rows: Input of the last layer. Shape ``[B, F]``.
        weight: Its weight. Shape ``[C * positions, F]``.
        bias: Its bias, ``[C * positions]``, if it has one.
        layout: Number of classes, then the lengths of further axes.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    layout: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits, ``[*B, C]``."""
        classes, *positions = self.layout
        return (len(self.rows), *positions, classes)

    def __call__(self, rows: Tensor | None = None, classes: slice = slice(None)) -> Tensor:
        """Return logits without a tangent.

        Args:
            rows: Flat indices of rows of ``[*B]``. None: all.
            classes: Slice of the classes.

        Returns:
            Shape ``[rows, classes]``.
        """
        hidden, weight, bias = map(primal, (self.rows, self.weight, self.bias))
        places = math.prod(self.layout[1:])
        begin, end, _ = classes.indices(self.layout[0])
        columns = slice(begin * places, end * places)
        hidden = hidden if rows is None else hidden[rows // places]
        product = torch.nn.functional.linear(
            hidden, weight[columns], None if bias is None else bias[columns]
        )
        if rows is None:
            return product.unflatten(-1, (-1, places)).movedim(-1, 1).flatten(0, 1)
        return product.unflatten(-1, (-1, places))[
            torch.arange(len(rows), device=rows.device), :, rows % places
        ]

    @torch.no_grad()
    def tangent(self) -> Tensor | None:
        """Return the tangent of the logits, None if no operand has one.

        A class whose bias is -inf does not exist; it gets the tangent of a class that does.
        """
        (rows, d_rows), (weight, d_weight) = map(forward_ad.unpack_dual, (self.rows, self.weight))
        bias, d_bias = (None, None) if self.bias is None else forward_ad.unpack_dual(self.bias)
        if d_rows is None and d_weight is None and d_bias is None:
            return None
        # By hand and in place: forward-mode AD would hold three more tiles, including the logits.
        # In blocks, so that the second product finds the first in a cache.
        d_rows = torch.zeros_like(rows) if d_rows is None else d_rows
        tangent = _empty(rows, len(weight))
        exists = None if bias is None or (bias > -math.inf).all() else bias > -math.inf
        for block, columns in _blocks(tangent):
            columns.addmm_(d_rows, weight[block].T, beta=0)
            if d_weight is not None:
                columns.addmm_(rows, d_weight[block].T)
            if d_bias is not None:
                columns.add_(d_bias[block])
        tangent = tangent.unflatten(-1, self.layout).movedim(1, -1)
        if exists is not None:
            exists = exists.unflatten(0, self.layout).movedim(0, -1).expand_as(tangent)
            fill = stand_in(tangent, exists)
            for block, columns in _blocks(tangent):
                columns.copy_(torch.where(exists[..., block], columns, fill))
        return tangent


def _empty(rows: Tensor, columns: int) -> Tensor:
    """Return memory ``[rows, columns]`` that returns to the system when it is freed."""
    count = len(rows) * columns
    if rows.device.type != "cpu":
        return rows.new_empty(len(rows), columns)
    # glibc would take a smaller block from its heap, where what is kept of each tile leaves no gap
    # for the next: ten and more tiles pile up. Pages that are never written take no memory.
    room = rows.new_empty(max(count, _MAPPED_BYTES // rows.element_size()))
    return room[:count].view(len(rows), columns)


def _blocks(tile: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the last axis and their elements, each small enough for a cache."""
    size = BLOCK_ELEMENTS if tile.device.type == "cpu" else TILE_ELEMENTS
    size = max(1, size * tile.shape[-1] // tile.numel())
    for begin in range(0, tile.shape[-1], size):
        block = slice(begin, begin + size)
        yield block, tile[..., block]


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows, each with as many logits as a tile holds.

    Args:
        rows: Number of rows.
        columns: Logits of a row, over all positions.

    Yields:
        The slices.
    """
    size = max(1, TILE_ELEMENTS // columns)
    for begin in range(0, rows, size):
        yield slice(begin, begin + size)


def primal(value: Any) -> Any:
    """Return a tensor without its tangent, and anything else as it is."""
    return forward_ad.unpack_dual(value).primal if isinstance(value, Tensor) else value
