"""What the guard reports of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "clipped", "skipped", "unmeasured", "rolled back"]


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
        status: "ok", "clipped" (scaled down), "skipped" (not taken), "unmeasured" (left alone) or
            "rolled back" (undone together with the steps before it: see `rollback` of SafeStep).
        seconds: Wall-clock time that the guard took in this step.
        bottleneck: Index of the row that set the radius, counted over the rows of all calls.
        reason: Why the step was skipped, rolled back or not measured, or which rows it was measured
            on where that is not as usual; with `sufficient_decrease`, also why a step over the
            limit was shortened or left alone; of a clipped or skipped step, which row set the
            radius and what a second run of the batch showed; else None.
        gradient_ratio: Slope of the loss along the update from the gradient that the optimizer
            used, over the slope from forward mode: 1 where that gradient is the loss's; where it
            was clipped, the factor. NaN where the step was not measured exactly.
        gradient_reason: Why an exactly measured step has no `gradient_ratio`, else None.
        divergence: KL divergence of the predictions from those after the proposed update, under
            linearised logits, in nats: the mean over the rows with their weights in the loss. NaN
            where r was predicted or not measured.
        loss_slope: Derivative of the mean loss of a row along the proposed update. NaN where that
            is not known.
        loss_reason: Why `loss_slope` of a measured step is NaN, else None.
        second_run: In a word, what the batch of a clipped, skipped or non-finite step gave when it
            was run again: "same", "rounded" (the same up to rounding), "other" or "unknown"; after
            a colon, the ranks on which it was another result, or why that is unknown. None where
            the batch was not run again.
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
    gradient_ratio: float = math.nan
    gradient_reason: str | None = None
    divergence: float = math.nan
    loss_slope: float = math.nan
    loss_reason: str | None = None
    second_run: str | None = None

    @property
    def predicted_change(self) -> float:
        """Change of the mean loss of a row that linearised logits predict of the whole update."""
        return self.loss_slope + self.divergence
