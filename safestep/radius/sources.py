"""Logits of the rows that climb the ladder: held in memory or computed on demand."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safestep.radius.histogram import Block, coarse_radius, histogram
from safestep.radius.rows import CHUNK_ELEMENTS, climb_rows

# Maps row indices (None: all) and, optionally, a slice of the classes to logits.
Source = Callable[..., Tensor]

# Maps logits and tangents ``[N, C]`` and their mask or None to radii ``[N]``.
RowRung = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows whose logits are in memory.

    Attributes:
        logits: Shape ``[N, C]``.
        tangent: Shape ``[N, C]``.
        mask: Classes that exist, ``[N, C]``, None if all do.
    """

    logits: Tensor
    tangent: Tensor
    mask: Tensor | None

    def climb(self, rung: RowRung, rows: Tensor) -> Tensor:
        """Return the radii of these rows, given in ascending order."""
        # If all rows are asked for, skip the copy: it takes as long as a scan.
        is_part = len(rows) < len(self.logits)
        all_rows = (self.logits, self.tangent, self.mask)
        return rung(*(x[rows] if is_part and x is not None else x for x in all_rows))

    def coarse(self, rows: Tensor) -> Tensor:
        """Return the coarse radii of these rows."""
        return self.climb(_coarse_rows, rows)


@dataclass(frozen=True, slots=True)
class ComputedRows:
    """Rows whose logits are too large to store beside their tangent.

    Attributes:
        source: Function that computes the logits.
        tangent: Shape ``[N, C]``.
        spread: Of the tangent. Shape ``[N]``.
    """

    source: Source
    tangent: Tensor
    spread: Tensor

    def climb(self, rung: RowRung, rows: Tensor) -> Tensor:
        """Return the radii of these rows, given in ascending order."""
        size = max(1, CHUNK_ELEMENTS // 2 // self.tangent.shape[-1])
        parts = [rung(self.source(some), self.tangent[some], None) for some in rows.split(size)]
        return torch.cat(parts)

    def coarse(self, rows: Tensor) -> Tensor:
        """Return the coarse radii of these rows; computes one block of logits at a time."""
        radius = math.pi / self.spread[rows]
        is_live = radius.isfinite()
        if is_live.any():
            spread = self.spread[rows[is_live]]
            climbed = self._coarse_live(rows[is_live], spread) / spread
            radius[is_live] = torch.maximum(radius[is_live], climbed)
        return radius

    def _coarse_live(self, rows: Tensor, spread: Tensor) -> Tensor:
        is_part = len(rows) < len(self.tangent)

        def block(classes: slice) -> tuple[Tensor, Tensor]:
            logits = self.source(rows if is_part else None, classes)
            tangent = self.tangent[rows, classes] if is_part else self.tangent[:, classes]
            return logits.to(spread), tangent.to(spread)

        lowest = self.tangent.amin(dim=-1).to(spread)[rows]
        return _coarse(block, self.tangent.shape[-1], lowest, spread)


def _coarse_rows(logits: Tensor, logit_tangent: Tensor, mask: Tensor | None) -> Tensor:
    return climb_rows("certified_radius", _coarse_held, logits, logit_tangent, mask, is_raw=True)


def _coarse_held(logits: Tensor, tangent: Tensor, lowest: Tensor, spread: Tensor) -> Tensor:
    def block(classes: slice) -> tuple[Tensor, Tensor]:
        return logits[:, classes], tangent[:, classes]

    return _coarse(block, logits.shape[-1], lowest, spread)


def _coarse(block: Block, classes: int, lowest: Tensor, spread: Tensor) -> Tensor:
    return coarse_radius(*histogram(block, classes, lowest, spread))
