"""Layer 1: what a measurement is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitTangent:
    """Logits and their tangent along the whole update.

    Attributes:
        name: Which logits.
        source: The logits before the update, ``[*B, C]``, or what computes them (see
            ``ladder_radius``).
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
        source = self.source
        return source if isinstance(source, Tensor) else source().view_as(self.tangent)
