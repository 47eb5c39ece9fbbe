"""What a finite difference measured of an update, and how another measurement compares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import pi

import torch
from torch import Tensor

from safestep.radius.batch import BatchRadius, LogitTangent
from safestep.radius.bounds import logit_spread

_UNSETTLED = 0.2  # share of r: an error that large leaves the check open


class Outcome(Enum):
    """What a check by finite difference says."""

    AGREES = "agrees"
    DIFFERS = "differs"
    UNSETTLED = "unsettled"  # the error of the difference is larger than what it could show


@dataclass(frozen=True, slots=True)
class Difference:
    """What a finite difference measured.

    Attributes:
        smallest: The smallest radius of the batch.
        error: How far `r` may be off, by what the two sides of the difference show.
    """

    smallest: BatchRadius
    error: float

    @classmethod
    def of(cls, smallest: BatchRadius, errors: ErrorBand) -> Difference:
        """Return the measurement with the error that its rows were seen to have."""
        low, high = errors.limits()
        return cls(smallest, max(high - smallest.spread, smallest.spread - low) / pi)

    @property
    def r(self) -> float:
        """R by the bound: the largest spread of a row, over pi."""
        return self.smallest.spread / pi

    def __str__(self) -> str:
        return f"r {self.r:.3g} +- {self.error:.1g}"

    @property
    def is_sure(self) -> bool:
        """Whether the error is a small part of r."""
        return self.error <= _UNSETTLED * self.r

    def compare(self, r: float, tolerance: float) -> Outcome:
        """Return how another measurement of the same update compares.

        Args:
            r: The other measurement.
            tolerance: Share of r by which that one may be off itself.

        Returns:
            DIFFERS only where both errors together cannot explain the distance.
        """
        largest = max(r, self.r)
        if abs(r - self.r) > tolerance * largest + 2 * self.error:
            return Outcome.DIFFERS
        return Outcome.AGREES if self.error <= _UNSETTLED * largest else Outcome.UNSETTLED


class ErrorBand:
    """Collect between which limits the largest spread of a batch lies."""

    def __init__(self) -> None:
        self._limits: list[Tensor] = []

    def noting(self, rows: Iterable[LogitTangent]) -> Iterator[LogitTangent]:
        """Yield the rows as they are, and note their errors."""
        for row in rows:
            if row.error is not None:
                spread = logit_spread(row.tangent, mask=row.mask)
                error = row.error if row.mask is None else row.error.where(row.mask, 0.0)
                low, high = (spread - error).amax(), (spread + error).amax()
                self._limits.append(torch.stack([low, high]).double())
            yield row
            del row  # which may be large, before the next is made

    def limits(self) -> tuple[float, float]:
        """Return the lower and the upper limit."""
        low, high = torch.stack(self._limits).amax(0).tolist()
        return low, high
