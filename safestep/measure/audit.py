"""Say how two measurements of one update compare, and when to compare the next two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import pi

import torch
from torch import Tensor

from safestep.radius.batch import BatchRadius, LogitTangent
from safestep.radius.bounds import logit_spread

FIRST_CHECKS = 3  # first measurements, all checked; after them the gaps grow
LONGEST_GAP = 64  # measurements from one check to the next
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


class Schedule:
    """Spread trials over a run: each that brings nothing new doubles the gap to the next.

    Args:
        first: Trials in a row before the gap grows.
    """

    def __init__(self, first: int = 1) -> None:
        self._first = first
        self.reset()

    def is_due(self) -> bool:
        """Return whether to try now; called once for each measurement."""
        self._since += 1
        return self._since >= self._gap

    def relax(self, *, at_once: bool = False) -> None:
        """Wait longer: the trial said what the one before it did, or `at_once`: it said nothing."""
        self._since, self._tried = 0, self._first if at_once else self._tried + 1
        if self._tried >= self._first:
            self._gap = min(2 * self._gap, LONGEST_GAP)

    def state_dict(self) -> dict[str, int]:
        """Return the state as plain numbers."""
        return {"since": self._since, "gap": self._gap, "tried": self._tried}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._since, self._gap, self._tried = state["since"], state["gap"], state["tried"]

    def reset(self) -> None:
        """Try again at the next measurement."""
        self._since, self._gap, self._tried = 0, 1, 0
