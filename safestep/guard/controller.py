"""From measured rows to a decision about the step, and the report of it."""

from __future__ import annotations

import math
from typing import Any

from safestep._warn import RaisedOnPurpose
from safestep.guard.decrease import SufficientDecrease
from safestep.guard.options import Action, check_limits
from safestep.guard.step_report import Status, StepReport
from safestep.measure.update import Estimator, Finding, Measurement
from safestep.radius.batch import BatchRule
from safestep.radius.bounds import RungOption


class TooManySkipsError(RaisedOnPurpose, RuntimeError):
    """The run does not get over its trouble."""


class StepController:
    """Decide how far an update may go.

    Args:
        max_normalized_step: Largest r that is let through.
        radius: The rung of the ladder of radii.
        action: "clip" scales a step over the limit down to it; "set" scales every step to it, up
            or down; "monitor" changes nothing.
        quantile: Quantile of the rows' r that the limit applies to; None for their maximum.
        max_consecutive_skips: Number of consecutive skipped steps that end the run.
        sufficient_decrease: Share of the promised decrease of the loss at which a step over the
            limit is left alone; None for no such rule.

    Raises:
        ValueError: If an option has a value that it may not have.
    """

    def __init__(
        self,
        max_normalized_step: float = 1.0,  # r = 1 is the radius itself
        radius: RungOption = "bound",
        action: Action = "clip",
        quantile: float | None = None,
        max_consecutive_skips: int = 25,
        sufficient_decrease: float | None = None,
    ) -> None:
        check_limits(max_normalized_step, radius, action, quantile)
        self.max_normalized_step = max_normalized_step
        self.radius: RungOption = radius
        self.action: Action = action
        self.quantile = quantile
        self.max_consecutive_skips = max_consecutive_skips
        if sufficient_decrease is not None and action == "set":
            raise ValueError(
                "SafeStep: expected `sufficient_decrease` to be None with action 'set', got "
                f"{sufficient_decrease!r}. 'set' makes every step r = the limit; choose 'clip'."
            )
        self.passes_long_steps = sufficient_decrease is not None
        self._decrease = SufficientDecrease(sufficient_decrease)
        self.step = 0
        self.skips_in_a_row = 0

    @property
    def rule(self) -> BatchRule:
        """How rows become one radius: climbing only as far as the decision needs."""
        limit = self.max_normalized_step if self.action == "clip" else None
        return BatchRule(self.radius, limit, self.quantile)

    def decide(self, measurement: Measurement, learning_rate: float) -> StepReport:
        """Return the report of this step, with the scale to apply, and count the step.

        Args:
            measurement: What was measured, agreed over the workers.
            learning_rate: The optimizer's, for the report.

        Returns:
            The report; ``seconds`` is left at 0 for the caller to fill in.
        """
        scale, status, reason = self._scale(measurement)
        estimator = measurement.method
        if self.quantile is not None:
            estimator = f"{estimator} ({self.quantile:g} quantile, uncertified)"
        step_norm = measurement.step_norm
        report = StepReport(
            step=self.step,
            normalized_step=measurement.normalized_step,
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
            reason=reason,
            gradient_ratio=measurement.slopes.ratio,
            gradient_reason=measurement.slopes.reason if measurement.is_exact else None,
            divergence=measurement.loss.divergence,
            loss_slope=measurement.loss.slope,
            loss_reason=measurement.loss.reason,
        )
        self.step += 1
        self.skips_in_a_row = self.skips_in_a_row + 1 if status == "skipped" else 0
        return report

    def severity(self, measurement: Measurement) -> float:
        """Return the number that decides about a step: over the limit, it is shortened.

        Args:
            measurement: What was measured of it, agreed over the workers.

        Returns:
            r; with `sufficient_decrease`, at most the limit if the loss falls enough.
        """
        excess = self._decrease.excess(measurement.loss)
        return min(measurement.normalized_step, self.max_normalized_step * excess)

    @property
    def is_held(self) -> bool:
        """Whether the next step is kept within the limit whatever its loss does."""
        return self._decrease.holds(self.step)

    def give_up_if_stuck(self, report: StepReport) -> None:
        """End a run that does not get over its trouble.

        Args:
            report: The latest step's.

        Raises:
            TooManySkipsError: If too many steps in a row were skipped.
        """
        if self.skips_in_a_row >= self.max_consecutive_skips:
            raise TooManySkipsError(
                f"SafeStep: {self.skips_in_a_row} steps in a row were not taken; the last because "
                f"{report.reason}. Parameters and optimizer state are those of the last step "
                "that was. Look for the cause there, lower the learning rate, or raise "
                "`max_consecutive_skips`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on counting."""
        counts = {"step": self.step, "skips_in_a_row": self.skips_in_a_row}
        return counts | self._decrease.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self.step = state["step"]
        self.skips_in_a_row = state["skips_in_a_row"]
        self._decrease.load_state_dict(state)

    def _scale(self, measurement: Measurement) -> tuple[float, Status, str | None]:
        """Return the scale, the status and the reason of a step."""
        reason = measurement.reason
        if measurement.finding.forbids_step and self.action != "monitor":
            return 0.0, "skipped", reason
        is_whole = measurement.finding is Finding.MEASURED
        left_alone: Status = "ok" if is_whole else "unmeasured"
        is_sure = measurement.estimator is Estimator.PREDICTED  # to pass, even over the limit
        if self.action == "monitor" or is_sure or not math.isfinite(measurement.radius):
            return 1.0, left_alone, reason
        scale = self.max_normalized_step * measurement.radius
        if scale < 1.0:
            is_shortened = self._decrease.shortens(self.step, measurement.loss)
            reason = "; ".join(filter(None, (reason, self._decrease.reason))) or None
            return (scale, "clipped", reason) if is_shortened else (1.0, left_alone, reason)
        # Growing a step asks for every worker's radius; shrinking it is safe without.
        scale = scale if self.action == "set" and is_whole else 1.0
        return scale, left_alone, reason
