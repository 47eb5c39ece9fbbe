"""Remember which losses the latest measurements were made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safestep.capture.call import Call

_MOST = 32  # forms of one loss; one that ever takes another form is not measured for that


class KnownLosses:
    """Tell a loss that was measured from another one, whose r no earlier measurement tells.

    Losses are told apart by their operations, so a squared error that takes the place of
    cross-entropy is noticed at its first step, without a look at any number.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def include(self, calls: Iterable[Call]) -> bool:
        """Return whether the losses of all calls were measured before, as far as can be seen.

        Args:
            calls: The calls of a step.
        """
        return len(self._known) >= _MOST or _losses(calls) <= self._known

    def learn(self, calls: Iterable[Call], *, is_measured: bool) -> None:
        """Take the losses of a step in; forget all where they could not be measured.

        Args:
            calls: The calls of the step.
            is_measured: Whether r was measured.
        """
        self._known = self._known | _losses(calls) if is_measured else set()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain texts."""
        return {"known": sorted(self._known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._known = set(state["known"])


def _losses(calls: Iterable[Call]) -> set[str]:
    """Return the operations of each loss; nothing of those whose graph does not show them."""
    return {operations for call in calls for operations in call.losses if operations is not None}
