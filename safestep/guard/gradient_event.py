"""What an audit of the gradient tells, and what the user should do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TO_REPAIR = (
    "Look for gradients that were not cleared before the backward pass, or changed after it (a "
    "hook, unintended clipping, a missing mean over ranks or batches), for a new term in the loss, "
    "and for a machine that computes wrong numbers"
)
TO_REPAIR_RANK = (
    "Look on that rank for gradients that were not cleared before the backward pass or changed in "
    "it (a hook), for a new term in the loss, and for a machine that computes wrong numbers"
)
TO_AUDIT = (
    "Pass the whole training step to guard.record(step, *args) just before it runs, where step "
    "returns the loss"
)


@dataclass(frozen=True, slots=True)
class GradientEvent:
    """What an audited step showed.

    Attributes:
        step: The step at which it was found.
        since: The step from which on the gradient does not match, as far as audited steps tell.
        finding: "wrong", "not audited", or "right" where it was wrong before.
        message: The event in a sentence.
        advice: What the user should do; None if there is nothing to warn of.
        ranks: The ranks whose own gradient it is about; none where it is that of all ranks.
    """

    step: int
    since: int
    finding: Literal["wrong", "not audited", "right"]
    message: str
    advice: str | None = None
    ranks: tuple[int, ...] = ()
