"""Decide which steps are audited."""

from __future__ import annotations

from safestep.guard.options import check_audit_interval


class GradientWatch:
    """Say at which steps the gradient is audited.

    Args:
        interval: Audit at least one in so many steps; None adds none.

    Raises:
        ValueError: If `interval` is not a positive integer or None.
    """

    def __init__(self, interval: int | None = None) -> None:
        check_audit_interval(interval)
        self._interval = interval

    def is_due(self, step: int) -> bool:
        """Return whether a step must be measured exactly.

        Args:
            step: Its number.
        """
        return self._interval is not None and step % self._interval == 0
