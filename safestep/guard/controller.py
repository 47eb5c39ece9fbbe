"""From measured rows to a decision about the step, and the report of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from torch import Tensor

from safestep.radius.batch import LogitTangent, Rung, smallest_row

Action = Literal["clip", "set", "monitor"]
Status = Literal["ok", "clipped", "skipped", "unmeasured"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What was measured at one optimizer step, and what was done about it.

    Attributes:
        step: Optimizer steps before this one.
        normalized_step: r = step_norm / radius of the update that the optimizer proposed. NaN where
            it was not measured. Under action "clip", a certified r is only refined as far as the
            decision needs: below the limit it may be the r of a lower rung, which is larger.
        radius: Convergence radius along the update, as a parameter distance.
        step_norm: 2-norm of the proposed update.
        spread: Largest directional logit spread over the rows, per unit of parameter distance.
        scale: Factor that was applied to the update: 1 where it was left alone, 0 where the step
            was not taken.
        learning_rate: ``lr`` of the optimizer's first parameter group.
        effective_learning_rate: ``scale * learning_rate``.
        estimator: How the logit tangent was found.
        status: "ok", "clipped" (scaled down), "skipped" (not taken) or "unmeasured" (left alone).
        seconds: Wall-clock time that the guard took in this step.
        bottleneck: Index of the row that set the radius, counted over the rows of all calls.
        reason: Why the step was skipped or not measured, else None.
    """

    step: int
    normalized_step: float
    radius: float
    step_norm: float
    spread: float
    scale: float
    learning_rate: float
    effective_learning_rate: float
    estimator: str
    status: Status
    seconds: float
    bottleneck: int | None
    reason: str | None = None


class Finding(IntEnum):
    """Outcome of a measurement, from the best to the worst: over workers, the worst one counts."""

    MEASURED = 0
    UNMEASURED = 1
    MEASUREMENT_NOT_FINITE = 2
    UPDATE_NOT_FINITE = 3
    GRADIENT_NOT_FINITE = 4

    @property
    def forbids_step(self) -> bool:
        """Return whether a step with this finding must not be taken."""
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


@dataclass(slots=True)
class Measurement:
    """One update as numbers of the host, on one worker or agreed over all of them.

    Attributes:
        finding: Whether the numbers below are to be trusted.
        radius: Smallest radius, in multiples of the update.
        spread: Largest spread along the whole update, unit: logits.
        bottleneck: Index of the row that set the radius.
        step_norm: 2-norm of the update.
        reason: What stood in the way of a measurement, else None.
        is_partial: Whether `step_norm` is that of this worker's shard alone.
    """

    finding: Finding
    radius: float
    spread: float
    bottleneck: int
    step_norm: float
    reason: str | None = None
    is_partial: bool = False


class StepController:
    """Decide how far an update may go.

    Args:
        max_normalized_step: Largest r that is let through.
        radius: The rung of the ladder of radii.
        action: "clip" scales a step over the limit down to it; "set" scales every step to it, up
            or down; "monitor" changes nothing.
        quantile: Quantile of the rows' r that the limit applies to; None for their maximum.
    """

    def __init__(
        self,
        max_normalized_step: float = 1.0,  # r = 1 is the radius itself
        radius: Rung = "bound",
        action: Action = "clip",
        quantile: float | None = None,
    ) -> None:
        _check_options(max_normalized_step, radius, action, quantile)
        self.max_normalized_step = max_normalized_step
        self.radius: Rung = radius
        self.action: Action = action
        self.quantile = quantile
        self.step = 0
        self.skips_in_a_row = 0
        self._heads: list[tuple[str, int]] = []

    def measure(self, rows: Iterable[LogitTangent]) -> Tensor:
        """Return ``smallest_row`` of the rows, climbing only as far as the decision needs."""
        limit = self.max_normalized_step if self.action == "clip" else None
        self._heads = []
        return smallest_row(
            self._noting_heads(rows), rung=self.radius, limit=limit, quantile=self.quantile
        )

    def head_of(self, bottleneck: int) -> str | None:
        """Return which logits a row of the latest measurement belongs to.

        Args:
            bottleneck: Index of the row.

        Returns:
            Their name; None if there is but one set of logits, or no such row.
        """
        if bottleneck < 0 or len({name for name, _ in self._heads}) < 2:
            return None
        for name, count in self._heads:
            bottleneck -= count
            if bottleneck < 0:
                return name
        return None

    def decide(self, measurement: Measurement, learning_rate: float, estimator: str) -> StepReport:
        """Return the report of this step, with the scale to apply, and count the step.

        Args:
            measurement: What was measured, agreed over the workers.
            learning_rate: The optimizer's, for the report.
            estimator: How it was measured.

        Returns:
            The report; ``seconds`` is left at 0 for the caller to fill in.
        """
        scale, status = self._scale(measurement)
        if self.quantile is not None:
            estimator = f"{estimator} ({self.quantile:g} quantile, uncertified)"
        step_norm = measurement.step_norm
        report = StepReport(
            step=self.step,
            normalized_step=_reciprocal(measurement.radius),
            radius=math.inf if math.isinf(measurement.radius) else step_norm * measurement.radius,
            step_norm=step_norm,
            spread=measurement.spread / step_norm if step_norm > 0 else measurement.spread,
            scale=scale,
            learning_rate=learning_rate,
            effective_learning_rate=scale * learning_rate if scale else 0.0,  # 0 * inf is NaN
            estimator=estimator,
            status=status,
            seconds=0.0,
            bottleneck=measurement.bottleneck if measurement.bottleneck >= 0 else None,
            reason=measurement.reason,
        )
        self.step += 1
        self.skips_in_a_row = self.skips_in_a_row + 1 if status == "skipped" else 0
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on counting."""
        return {"step": self.step, "skips_in_a_row": self.skips_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self.step = state["step"]
        self.skips_in_a_row = state["skips_in_a_row"]

    def _noting_heads(self, rows: Iterable[LogitTangent]) -> Iterator[LogitTangent]:
        for row in rows:
            self._heads.append((row.name, row.tangent.shape[:-1].numel()))
            yield row

    def _scale(self, measurement: Measurement) -> tuple[float, Status]:
        if measurement.finding.forbids_step and self.action != "monitor":
            return 0.0, "skipped"
        is_whole = measurement.finding is Finding.MEASURED
        if self.action == "monitor" or not math.isfinite(measurement.radius):
            return 1.0, "ok" if is_whole else "unmeasured"
        scale = self.max_normalized_step * measurement.radius
        if scale < 1.0:
            return scale, "clipped"
        # Growing a step asks for every worker's radius; shrinking it is safe without.
        return (
            scale if self.action == "set" and is_whole else 1.0,
            "ok" if is_whole else "unmeasured",
        )


def _reciprocal(radius: float) -> float:
    return math.inf if radius == 0 else 1.0 / radius


def _check_options(limit: float, radius: str, action: str, quantile: float | None) -> None:
    if not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
        raise ValueError(
            f"SafeStep: expected `max_normalized_step` to be a positive number, got {limit!r}. "
            "1.0 is the radius itself."
        )
    for name, value, allowed in (
        ("radius", radius, ("bound", "certified")),
        ("action", action, ("clip", "set", "monitor")),
    ):
        if value not in allowed:
            raise ValueError(
                f"SafeStep: expected `{name}` to be one of {', '.join(map(repr, allowed))}, "
                f"got {value!r}. Choose one of them."
            )
    if quantile is not None and not (isinstance(quantile, float) and 0 < quantile <= 1):
        raise ValueError(
            f"SafeStep: expected `quantile` to be None or a float in (0, 1], got {quantile!r}. "
            "0.99 leaves the one row in a hundred with the largest r out; None is certified."
        )
