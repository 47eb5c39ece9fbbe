"""What failed in the guard's own code: the reason that a step is not measured."""

from __future__ import annotations

from collections import Counter

from safestep._warn import warn_user

MANY = 16  # failures of one kind after which the user is told


class Failures:
    """Collect what failed since the last step.

    Example:
        >>> failures = Failures()
        >>> failures.note("recording a forward call", ValueError("no such key"))
        >>> failures.take()
        'recording a forward call failed (ValueError: no such key)'
        >>> failures.take()
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._counts: Counter[str] = Counter()

    def note(self, what: str, error: BaseException, *, is_needed: bool = True) -> None:
        """Take note of a failure.

        Args:
            what: What was tried, as ``"recording a forward call"``.
            error: The error.
            is_needed: Whether the next step cannot be measured without it.
        """
        if not isinstance(error, Exception):  # an interrupt, which ends the call as well
            return
        reason = f"{what} failed ({one_line(error)})"
        if is_needed:
            self._reason = self._reason or reason
        self._counts[what] += 1
        if self._counts[what] == MANY:
            warn_user(
                f"SafeStep: {reason}, for the {MANY}th time. Training goes on as without SafeStep; "
                "guard.last.status shows which steps are not measured. Please report it."
            )

    def take(self) -> str | None:
        """Return why the next step cannot be measured, None if it can, and forget it."""
        reason, self._reason = self._reason, None
        return reason


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, after its type where that says more."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, RuntimeError) and text else f"{type(error).__name__}: {text}"
