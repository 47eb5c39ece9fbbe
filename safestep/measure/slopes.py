"""The loss's slope along an update, found with and without a backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, isfinite, isnan, log10, nan
from typing import Any, NamedTuple

# Where the slope is that small against its terms, rounding alone makes any ratio.
_PERPENDICULAR = 1e-3
_SAME = 1e-6  # of the size: replicas have one gradient and one update
_NEAR, _NEAR_COARSE = 1e-4, 0.02  # distance of the ratio from 1 up to which it may be rounding
_GROSS, _GROSS_COARSE = 0.02, 0.1  # distance from 1 over which it is not rounding


@dataclass(frozen=True, slots=True)
class Slopes:
    """The loss's slope along an update, from the outputs and from the parameters' gradient.

    Attributes:
        outputs: Sum over the outputs of the loss's gradient there times the output's tangent.
        gradient: Sum over the parameters of the gradient that the optimizer used times the update.
        size: 2-norm of the terms of each sum, added: the unit of their difference.
        obstacle: Why they cannot be compared, else None.
        is_coarse: Whether anything was computed in half precision.
        own: Those of the rank's own batch and its gradient from before the all-reduce; of no
            meaning on a lone rank.
        ranks: The `own` of each rank; empty if they are not known.
        is_agreed: Whether all ranks know the same of the run, and so come to one decision.

    Example:
        >>> Slopes(outputs=-2.0, gradient=-0.5, size=3.0).ratio
        0.25
    """

    outputs: float = nan
    gradient: float = nan
    size: float = nan
    obstacle: str | None = None
    is_coarse: bool = False
    own: Slopes | None = None
    ranks: tuple[Slopes, ...] = ()
    is_agreed: bool = True

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

    @property
    def is_near(self) -> bool:
        """Whether the ratio is so near to 1 that rounding may be all."""
        return abs(self.ratio - 1) <= (_NEAR_COARSE if self.is_coarse else _NEAR)

    @property
    def is_gross(self) -> bool:
        """Whether the ratio is further from 1 than rounding takes it."""
        return abs(self.ratio - 1) > (_GROSS_COARSE if self.is_coarse else _GROSS)

    def __str__(self) -> str:
        """Return the ratio with the digits that tell it from 1."""
        ratio = self.ratio
        digits = 3 if ratio in (0, 1) else max(3, 3 - floor(log10(abs(ratio - 1))))
        return f"{ratio:.{min(digits, 10)}g}"


UNSEEN = Slopes(obstacle="a finite difference shows no exact slope")


class SlopesMessage(NamedTuple):
    """What a rank tells the others of its slopes. The fields are numbers, or columns of all ranks.

    Attributes:
        outputs: Its `Slopes.outputs`; NaN where it could not compare.
        gradient: Its `Slopes.gradient`.
        size: Its `Slopes.size`.
        own_gradient: `gradient` of its `Slopes.own`.
        own_size: `size` of its `Slopes.own`.
        state: A number that is equal on ranks that know the same of the run.
    """

    outputs: Any
    gradient: Any
    size: Any
    own_gradient: Any
    own_size: Any
    state: Any

    @classmethod
    def of(cls, slopes: Slopes, state: float) -> SlopesMessage:
        """Return the message of a rank."""
        own = slopes.own or UNSEEN
        return cls(slopes.outputs, slopes.gradient, slopes.size, own.gradient, own.size, state)


def over_ranks(
    mine: Slopes, sent: SlopesMessage, *, copies: float | None, is_whole: bool
) -> Slopes:
    """Return the slopes of the batch of all ranks, whose loss is the mean of the ranks' losses.

    Args:
        mine: Those of this rank.
        sent: A list in each field, of what every rank sent.
        copies: Where each rank's `gradient` is that of its shards, how often they hold all of them.
        is_whole: Whether every rank has data.

    Returns:
        The slopes.

    Example:
        >>> mine = Slopes(outputs=-2.0, gradient=-3.0, size=3.0)
        >>> sent = SlopesMessage([-2, -4], [-3, -3], [3, 5], [-2, -4], [3, 5], [0, 0])
        >>> over_ranks(mine, sent, copies=None, is_whole=True).ratio
        1.0
    """
    if not is_whole:
        return Slopes(obstacle="a rank has no more data")
    ranks = tuple(
        Slopes(*own, is_coarse=mine.is_coarse)
        for own in zip(sent.outputs, sent.own_gradient, sent.own_size, strict=True)
    )
    known = {"own": mine.own, "ranks": ranks, "is_coarse": mine.is_coarse}
    unknown = next((rank for rank, slope in enumerate(sent.outputs) if isnan(slope)), None)
    if unknown is not None:
        obstacle = mine.obstacle or f"rank {unknown} does not know its loss's slope"
        return Slopes(obstacle=obstacle, **known)
    size = max(sent.size)
    if copies is None and not max(sent.gradient) - min(sent.gradient) <= _SAME * size:
        return Slopes(obstacle="the ranks use gradients of their own", **known)
    gradient = sent.gradient[0] if copies is None else sum(sent.gradient) / copies
    outputs = sum(sent.outputs) / len(sent.outputs)
    is_agreed = min(sent.state) == max(sent.state)
    return Slopes(outputs, gradient, size, is_agreed=is_agreed, **known)
