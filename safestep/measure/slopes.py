"""The loss's slope along an update, found with and without a backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan

# Where the slope is that small against its terms, rounding alone makes any ratio.
_PERPENDICULAR = 1e-3
_SAME = 1e-6  # of the size: replicas have one gradient and one update


@dataclass(frozen=True, slots=True)
class Slopes:
    """The loss's slope along an update, from the outputs and from the parameters' gradient.

    Attributes:
        outputs: Sum over the outputs of the loss's gradient there times the output's tangent.
        gradient: Sum over the parameters of the gradient that the optimizer used times the update.
        size: 2-norm of the terms of each sum, added: the unit of their difference.
        obstacle: Why they cannot be compared, else None.
        is_coarse: Whether anything was computed in half precision.

    Example:
        >>> Slopes(outputs=-2.0, gradient=-0.5, size=3.0).ratio
        0.25
    """

    outputs: float = nan
    gradient: float = nan
    size: float = nan
    obstacle: str | None = None
    is_coarse: bool = False

    @property
    def ratio(self) -> float:
        """`gradient` / `outputs`: 1 where the gradient is the loss's; after clipping, the factor.

        NaN where the two cannot be compared.
        """
        return self.gradient / self.outputs if self.reason is None else nan

    @property
    def difference(self) -> float:
        """Difference of the two slopes in units of `size`, NaN where it is unknown."""
        is_known = self.obstacle is None and self.size > 0
        return (self.gradient - self.outputs) / self.size if is_known else nan

    @property
    def reason(self) -> str | None:
        """Why there is no ratio, else None."""
        if self.obstacle is not None:
            return self.obstacle
        if not (isfinite(self.outputs) and isfinite(self.gradient)):
            return "the slope of the loss along the update is not finite"
        if abs(self.outputs) <= _PERPENDICULAR * self.size:
            return "the loss has next to no slope along the update"
        return None


UNSEEN = Slopes(obstacle="a finite difference shows no exact slope")


def over_ranks(
    mine: Slopes, rows: Sequence[Sequence[float]], *, are_parts: bool, is_whole: bool
) -> Slopes:
    """Return the slopes of the batch of all ranks, whose loss is the mean of the ranks' losses.

    Args:
        mine: Those of this rank.
        rows: Of each rank: `outputs`, `gradient` and `size`; NaN where it could not compare them.
        are_parts: Whether each rank's `gradient` is that of its shards.
        is_whole: Whether every rank has data.

    Returns:
        The slopes.

    Example:
        >>> mine = Slopes(outputs=-2.0, gradient=-3.0, size=3.0)
        >>> over_ranks(mine, [(-2, -3, 3), (-4, -3, 5)], are_parts=False, is_whole=True).ratio
        1.0
    """
    if not is_whole:
        return Slopes(obstacle="a rank has no more data")
    unknown = next((rank for rank, row in enumerate(rows) if isnan(row[0])), None)
    if unknown is not None:
        return Slopes(obstacle=mine.obstacle or f"rank {unknown} does not know its loss's slope")
    outputs, gradients, sizes = zip(*rows, strict=True)
    size = max(sizes)
    if not are_parts and not max(gradients) - min(gradients) <= _SAME * size:
        return Slopes(obstacle="the ranks use gradients of their own")
    gradient = sum(gradients) if are_parts else gradients[0]
    return Slopes(sum(outputs) / len(rows), gradient, size, is_coarse=mine.is_coarse)
