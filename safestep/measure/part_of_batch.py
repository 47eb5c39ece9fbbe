"""Measure a few examples of a batch in place of all, where they are known to tell enough."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf, pi
from statistics import median
from typing import Any

from torch import Tensor

from safestep.capture.call import Call
from safestep.measure.schedule import Schedule
from safestep.measure.update import Estimator, Measurement, Update
from safestep.radius.batch import BatchRadius, LogitTangent
from safestep.radius.bounds import logit_spread

_SHARE = 8  # one example in so many is measured, but for the least
_LEAST = 2  # examples; of one alone the spread says little about the largest
_FEWEST = 8  # examples of a batch: of fewer, all are measured
_WINDOW = 32  # exact measurements that show how much larger the largest spread is
_FIRST_CHECKS = 2  # that must agree before a part is trusted
_FIRST_RATIOS = 4
_VARIATION = 1.6  # of the ratios, largest to median: if they vary more, a part tells too little


class PartOfBatch:
    """What the first examples of a batch tell about all of them.

    The largest spread of a row is estimated as that among the first examples, times the median of
    what the last exact measurements found this ratio to be. Where the ratio varies a lot, as in
    small batches, a part does not tell enough.

    Whether the examples alone have the spreads that they have among all is tried out beside exact
    measurements, the first and then ever fewer. BatchNorm in train mode couples examples, dropout
    draws another mask for fewer: there all examples are measured.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_WINDOW)
        self._checks = Schedule(_FIRST_CHECKS)
        self._agreed = 0  # checks in a row
        self._spreads: list[Tensor] = []  # largest of the first examples, of each set of rows

    def can_tell(self, update: Update) -> bool:
        """Return whether a part of the batch will do in place of all of it."""
        if self._agreed < _FIRST_CHECKS or len(self._ratios) < _FIRST_RATIOS or update.is_sharded:
            return False
        is_steady = max(self._ratios) <= _VARIATION * median(self._ratios)
        return is_steady and _sizes(update.calls) is not None

    def of(self, update: Update) -> Update:
        """Return the update with the first examples of its calls alone.

        Args:
            update: The update.

        Raises:
            ValueError: If the calls cannot be cut.
        """
        sizes = _sizes(update.calls)
        if sizes is None:
            raise ValueError("the calls have too few examples, or not the same number")
        return replace(update, calls=[call.first(sizes[0]) for call in update.calls])

    def noting(self, rows: Iterable[LogitTangent], update: Update) -> Iterator[LogitTangent]:
        """Yield the rows of a whole batch unchanged, and note the spread of the first examples.

        Args:
            rows: Logits and tangents, one set of rows at a time.
            update: The update that they belong to.
        """
        self._spreads = []
        sizes = None if update.is_sharded else _sizes(update.calls)
        for row in rows:
            count = 0 if sizes is None else len(row.tangent) * sizes[0] // sizes[1]
            # A tile of a large vocabulary may hold few rows, and a single row has no axis of them.
            if count and row.tangent.ndim > 1:
                mask = None if row.mask is None else row.mask[:count]
                self._spreads.append(logit_spread(row.tangent[:count], mask=mask).amax().double())
            yield row
            del row  # frees its memory before the next one is computed

    def learn(self, whole: BatchRadius) -> float:
        """Take the ratio that an exact measurement shows.

        Args:
            whole: The measurement, whose rows `noting` has yielded.

        Returns:
            The largest spread of the first examples, 0 if it is not known.
        """
        first = max((float(each) for each in self._spreads), default=0.0)
        self._spreads = []
        if 0 < first < inf and first <= whole.spread < inf:
            self._ratios.append(whole.spread / first)
        return first

    def is_due(self, first: float) -> bool:
        """Return whether to measure the part beside the whole now.

        Args:
            first: What `learn` returned.
        """
        return 0 < first < inf and self._checks.is_due()

    def compare(self, first: float, alone: float, tolerance: float) -> None:
        """Take a check.

        Args:
            first: Largest spread of the first examples among all.
            alone: That of these examples alone; NaN if they could not be run.
            tolerance: Relative error that rounding may explain.
        """
        agrees = abs(alone - first) <= tolerance * first
        self._agreed = self._agreed + 1 if agrees else 0
        self._checks.relax()

    def estimate(self, update: Update, part: BatchRadius) -> Measurement:
        """Return the estimate for a whole batch.

        Args:
            update: The update.
            part: What was measured of its first examples.
        """
        spread = part.spread * median(self._ratios)
        row = part.index if len(update.calls) == 1 else -1
        return Measurement(
            Estimator.SAMPLED, radius=pi / spread if spread else inf, spread=spread,
            bottleneck=row, head=part.head, examples=_sizes(update.calls),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists."""
        checks = self._checks.state_dict()
        return {"ratios": list(self._ratios), "agreed": self._agreed, "checks": checks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._ratios = deque(state["ratios"], maxlen=_WINDOW)
        self._agreed = state["agreed"]
        self._checks.load_state_dict(state["checks"])

    def distrust(self) -> None:
        """Measure whole batches until checks agree again."""
        self._agreed = 0
        self._checks.reset()


def _sizes(calls: Sequence[Call]) -> tuple[int, int] | None:
    """Return how many examples of each call are measured, and of how many; None if all are."""
    sizes = {call.num_examples for call in calls}
    every = sizes.pop() if len(sizes) == 1 else 0
    return (max(_LEAST, every // _SHARE), every) if every >= _FEWEST else None
