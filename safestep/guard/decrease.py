"""Decide whether a step over the limit is shortened, by what it does to the linearised loss."""

from __future__ import annotations

import math
from typing import Any

from safestep.guard.options import check_sufficient_decrease
from safestep.radius.loss_change import LossChange

MEMORY = 16  # steps; a spike that lasts is shortened again and again by ever less
FLOOR = 1e-3  # nats; momentum may point uphill on a batch


class SufficientDecrease:
    """Leave a step alone whose linearised loss falls enough, unless one was shortened just before.

    The loss falls enough if slope + divergence <= c * slope (Armijo's condition, for the linearised
    loss), or if the divergence is at most 0.001 nats. After a step that did not, the next 16 are
    kept within the limit whatever they do to the loss. Where the slope is not known, every step
    over the limit is shortened.

    Args:
        share: c, the share of the decrease promised by the slope that is enough; None for no such
            rule: every step over the limit is shortened.

    Raises:
        ValueError: If `share` is not None or a number in [0, 1).

    Reference:
        Nocedal and Wright, Numerical Optimization, Eq. (3.4).

    Example:
        >>> rule = SufficientDecrease(0.5)
        >>> rule.shortens(7, LossChange(divergence=0.2, slope=-1.0, weight=1.0))
        False
        >>> rule.shortens(8, LossChange(divergence=0.9, slope=-1.0, weight=1.0))
        True
        >>> rule.reason
        'the linearised loss would change by -0.1 nats where its slope promises -1'
    """

    def __init__(self, share: float | None = None) -> None:
        check_sufficient_decrease(share)
        self.reason: str | None = None
        self._share = share
        self._last: int | None = None  # the latest step whose loss did not fall enough

    def shortens(self, step: int, change: LossChange) -> bool:
        """Return whether to shorten a step that is over the limit; `reason` then says why.

        Args:
            step: Its number.
            change: What linearised logits predict of the loss.

        Returns:
            Whether to shorten it.
        """
        self.reason = None
        if self._share is None:
            return True
        if self.excess(change) > 1.0:
            self._last = step
            self.reason = _not_enough(change)
            return True
        if self.holds(step):
            self.reason = f"held within the limit for {MEMORY} steps after step {self._last}"
            return True
        self.reason = "over the limit and left alone: the linearised loss falls enough"
        return False

    def excess(self, change: LossChange) -> float:
        """Return the divergence over the largest one that the rule allows.

        Args:
            change: What is predicted of the loss, or what a secant found.

        Returns:
            At most 1 if the loss falls enough; infinite if that is not known, or without a rule.
        """
        return math.inf if self._share is None else change.excess(self._share, FLOOR)

    def holds(self, step: int) -> bool:
        """Return whether a step is kept within the limit whatever its loss does.

        Args:
            step: Its number.
        """
        return self._last is not None and step - self._last <= MEMORY

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, as plain numbers."""
        return {} if self._last is None else {"held_since": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._last = state.get("held_since")


def _not_enough(change: LossChange) -> str:
    if change.reason is not None:
        return f"it is not known whether the loss would fall: {change.reason}"
    total = change.slope + change.divergence
    return (
        f"the linearised loss would change by {total:.3g} nats where its slope promises "
        f"{change.slope:.3g}"
    )
