"""An update of the parameters, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from math import inf, nan, pi, sqrt
from threading import RLock
from typing import Any

from torch import Tensor

from safestep.capture.call import Call
from safestep.measure.estimator_registry import Estimator
from safestep.measure.perturb import moved_back
from safestep.measure.slopes import UNSEEN, Slopes
from safestep.parallel.placements import shares
from safestep.radius.batch import Row
from safestep.radius.loss_change import NO_CHANGE, LossChange

# Forward mode, the choice of kernels and the functions that are made visible are the process's.
_ONE_AT_A_TIME = RLock()


@dataclass(slots=True)
class Update:
    """What an estimator is given.

    Attributes:
        calls: The calls that the update was computed from.
        params: The trained parameters, after the update.
        start: Their values before it.
        change: The update of each of them.
        is_made: False where the update is still to come: `params` are at the start.
        is_sharded: Whether this rank holds only a shard of any parameter.
        gradient_obstacle: Why ``.grad`` is not the gradient that the update was made from, else
            None.
    """

    calls: Sequence[Call]
    params: Sequence[Tensor]
    start: Sequence[Tensor]
    change: Sequence[Tensor]
    is_made: bool = True
    is_sharded: bool = False
    gradient_obstacle: str | None = None

    def parts(self) -> list[Tensor]:
        """Return tensors whose joint 2-norm is that of the update; of this rank's part of it."""
        pairs = zip(self.change, shares(self.params), strict=True)
        return [move if share == 1 else move * sqrt(share) for move, share in pairs]

    def alone(self) -> AbstractContextManager[Any]:
        """Return a context in which no other thread runs a call again."""
        # Ranks of shards wait for each other while they measure, so they must not wait for a lock.
        return nullcontext() if self.is_sharded else _ONE_AT_A_TIME

    def at_start(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters are where the update begins."""
        return moved_back(self.params, self.start) if self.is_made else nullcontext()


class Finding(IntEnum):
    """Outcome of a measurement, from the best to the worst: over workers, the worst one counts."""

    MEASURED = 0
    UNMEASURED = 1
    MEASUREMENT_NOT_FINITE = 2
    UPDATE_NOT_FINITE = 3
    GRADIENT_NOT_FINITE = 4

    @property
    def forbids_step(self) -> bool:
        """Whether a step with this finding must not be taken."""
        return self >= Finding.MEASUREMENT_NOT_FINITE

    def __str__(self) -> str:
        return _FINDINGS[self]


_FINDINGS = {
    Finding.MEASURED: "measured",
    Finding.UNMEASURED: "the radius could not be measured",
    Finding.MEASUREMENT_NOT_FINITE: "the logits or their tangent are not finite",
    Finding.UPDATE_NOT_FINITE: "the update is not finite",
    Finding.GRADIENT_NOT_FINITE: "the gradient is not finite",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is known of one update, on one worker or agreed over all of them.

    Attributes:
        estimator: How it was found.
        finding: Whether the numbers below are to be trusted.
        radius: Smallest radius, in multiples of the update.
        spread: Largest spread along the whole update, unit: logits.
        bottleneck: Index of the row that set the radius, -1 where there is none.
        step_norm: 2-norm of the update; of this worker's shard where `is_partial`.
        reason: What stood in the way of a measurement, else None.
        head: Which set of logits the row belongs to, None if there is only one.
        remarks: What the report adds to the estimator's name, each in parentheses.
        warning: What the user should be told once, else None.
        examples: Of a sampled one, how many examples were measured, and of how many.
        is_partial: Whether `step_norm` is that of this worker's shard alone.
        is_lost: Whether another worker left this one waiting, and their group is lost.
        slopes: The loss's slope along the update, by forward mode and from the gradient.
        loss: What linearised logits predict of the loss.
        row: Where the row is in this worker's batch; None where it may be another worker's.
    """

    estimator: Estimator
    finding: Finding = Finding.MEASURED
    radius: float = nan
    spread: float = nan
    bottleneck: int = -1
    step_norm: float = nan
    reason: str | None = None
    head: str | None = None
    remarks: tuple[str, ...] = ()
    warning: str | None = None
    is_partial: bool = False
    is_lost: bool = False
    examples: tuple[int, int] | None = None
    slopes: Slopes = UNSEEN
    loss: LossChange = NO_CHANGE
    row: Row | None = None

    @classmethod
    def predicted(cls, normalized_step: float, step_norm: float) -> Measurement:
        """Return what a prediction of r stands for."""
        radius = 1.0 / normalized_step if normalized_step else inf
        return cls(
            Estimator.PREDICTED, radius=radius, spread=normalized_step * pi, step_norm=step_norm
        )

    @classmethod
    def failed(cls, reason: str, estimator: Estimator = Estimator.JVP) -> Measurement:
        """Return what is known of an update that could not be measured: why."""
        return cls(estimator, Finding.UNMEASURED, reason=reason)

    @property
    def normalized_step(self) -> float:
        """R of the update: the reciprocal of its radius."""
        return 1.0 / self.radius if self.radius else inf

    @property
    def is_exact(self) -> bool:
        """Whether r is measured, by the exact estimator or by one that stands in for it."""
        is_cheap = self.estimator in {Estimator.PREDICTED, Estimator.SAMPLED, Estimator.SECANT}
        return self.finding is Finding.MEASURED and not is_cheap

    @property
    def method(self) -> str:
        """How it was found, for the report: the estimator's name and the remarks."""
        share = [] if self.examples is None else ["{}/{}".format(*self.examples)]
        remarks = (f"({remark})" for remark in self.remarks)
        return " ".join([self.estimator.value, *share, *remarks])
