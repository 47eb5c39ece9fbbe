"""When to try again what could not be measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence

from safestep.capture import LogitsNotFoundError
from safestep.capture.call import Call
from safestep.capture.failures import one_line
from safestep.measure.update import Measurement

TRIES = 8  # in a row that find no logits, before the first pause
TRIES_AFTER_ERRORS = 32  # where an error came between, which may go away
FIRST_PAUSE = 24  # steps; the next ones are eight times as long each
LONGEST_PAUSE = 2000  # steps


class Retries:
    """Try again ever more rarely what could not be measured, and for another loss at once.

    An attempt that fails may cost fifty plain steps. After 8 in a row that find no logits, or 32
    that end in an error, there are pauses of 24, 192 and 1536 steps, then of 2000.

    Attributes:
        reason: Why the latest attempt failed, None if it did not.

    Example:
        >>> retries = Retries()
        >>> for _ in range(8):
        ...     retries.fail("no logits", seen="a loss", is_error=False)
        >>> retries.is_due("a loss"), retries.is_due("another loss")
        (False, True)
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._seen: Collection[Hashable] = ()
        self._failures = 0  # in a row, at the same loss
        self._pause = 0  # steps to come without an attempt

    @property
    def paused(self) -> Collection[Hashable]:
        """Looks of the calls to which no attempt is made at the next step."""
        return self._seen if self.is_pausing else ()

    @property
    def is_pausing(self) -> bool:
        """Whether the next attempt at the same loss is not yet due."""
        return self._pause > 0

    def is_due(self, seen: Collection[Hashable]) -> bool:
        """Return whether to make an attempt: no pause is on, or the loss is another one.

        Args:
            seen: What is known of the loss without an attempt.
        """
        return not self.is_pausing or seen != self._seen

    def skip(self) -> None:
        """Let a step of the pause pass without an attempt."""
        self._pause -= 1

    def fail(self, reason: str, seen: Collection[Hashable], *, is_error: bool) -> None:
        """Take note of an attempt that failed.

        Args:
            reason: Why.
            seen: What is known of the loss without an attempt.
            is_error: Whether an error came between, which says nothing about the loss.
        """
        self._failures = self._failures + 1 if seen == self._seen else 1
        self.reason, self._seen = reason, seen
        pauses = self._failures - (TRIES_AFTER_ERRORS if is_error else TRIES)
        self._pause = min(FIRST_PAUSE * 8**pauses, LONGEST_PAUSE) if pauses >= 0 else 0

    def succeed(self) -> None:
        """Take note of an attempt that did not fail."""
        self.reason, self._seen, self._failures, self._pause = None, (), 0, 0

    def attempt(
        self, calls: Sequence[Call], measure: Callable[[], Measurement], *, counts: bool
    ) -> Measurement | None:
        """Measure, unless it would only fail again.

        Args:
            calls: The calls that show the loss.
            measure: Raises an error if it fails.
            counts: Whether a failure shows that the next attempt may fail too.

        Returns:
            What `measure` returns; None if it was not called.
        """
        if self.is_pausing and not self.is_due(_looks(calls)):
            self.skip()
            return None
        try:
            found = measure()
        except Exception as error:
            if counts:
                is_error = not isinstance(error, LogitsNotFoundError)
                self.fail(one_line(error), _looks(calls), is_error=is_error)
            raise
        self.succeed()
        return found


def _looks(calls: Sequence[Call]) -> frozenset[Hashable]:
    """Return what is known of the loss without an attempt."""
    return frozenset(call.look() for call in calls)
