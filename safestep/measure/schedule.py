"""When to try again what brought nothing new."""

LONGEST_GAP = 64  # measurements from one trial to the next


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
