"""Layer 1: what a measurement is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import EllipsisType

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitTangent:
    """Logits and their tangent along the whole update.

    Attributes:
        name: Which logits.
        source: The logits before the update, ``[*B, C]``, or what computes them.
        tangent: Their directional derivative. Shape ``[*B, C]``, unit: logits.
        mask: True where a row counts, None if all do. Shape ``[*B]``.
    """

    name: str
    source: Tensor | Callable[..., Tensor]
    tangent: Tensor
    mask: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The logits; computed anew each time where they are too many to hold."""
        return self.source if isinstance(self.source, Tensor) else self.source()

    def parts(self) -> Iterator[tuple[slice | EllipsisType, LogitTangent]]:
        """Yield the rows in parts whose logits can be held beside the tangent of all.

        Yields:
            Which rows, as an index, and these rows.
        """
        if isinstance(self.source, Tensor):
            yield ..., self
            return
        size = math.ceil(len(self.tangent) / 2)
        for begin in range(0, len(self.tangent), size):
            rows = slice(begin, begin + size)
            mask = None if self.mask is None else self.mask[rows]
            part = LogitTangent(self.name, partial(self.source, rows), self.tangent[rows], mask)
            yield rows, part
