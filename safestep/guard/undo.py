"""What the guard can do with an optimizer step: know its update, scale it, undo it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from safestep.capture.call import Call
from safestep.capture.failures import one_line
from safestep.guard.step_report import StepReport
from safestep.measure.update import Update


class Undo(Protocol):
    """One optimizer step that can be measured, scaled and undone.

    ``Snapshot`` copies what the step may change; ``Lookahead`` computes the update beforehand.

    Attributes:
        params: The parameters that the step changes, from `take` or `update` to `release`.
    """

    params: list[Tensor]

    def take(self) -> None:
        """Begin a step: note what is needed to undo it."""

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update of the step.

        Args:
            calls: The calls that its gradients were computed from.

        Returns:
            The update, valid until `release`.
        """
        ...

    def rescale(self, scale: float) -> None:
        """Make the update `scale` times as long.

        Args:
            scale: Factor of the update.
        """

    def restore(self) -> None:
        """Leave parameters, optimizer state and options as they were before the step."""

    def release(self) -> None:
        """End the step, also one that raised, and free what was kept for it."""


def carry_out(report: StepReport, undo: Undo) -> StepReport:
    """Scale or undo the step as it was decided; undo one that cannot be scaled.

    Args:
        report: The decision.
        undo: The step.

    Returns:
        The report of what was done.
    """
    try:
        if report.status == "skipped":
            undo.restore()
        elif report.scale != 1.0:
            undo.rescale(report.scale)
        return report
    except Exception as error:
        reason = f"the step could not be scaled or undone ({one_line(error)})"
    try:
        undo.restore()
    except Exception:
        return replace(report, status="unmeasured", scale=1.0, reason=reason)
    return replace(report, status="skipped", scale=0.0, effective_learning_rate=0.0, reason=reason)
