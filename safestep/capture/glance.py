"""Tell whether the loss is still the same, without recording calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial

from torch import Tensor

from safestep.capture.gradient import zero_sum_axis
from safestep.capture.hooks import kept_out

_ROWS = 4  # enough of a gradient to show whether it sums to zero over classes


class Glance:
    """Keep a few rows of the gradients at the outputs of a step's calls.

    Args:
        failed: Told of errors in its hooks.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._calls: list[dict[str, Tensor]] = []  # rows by name of the output, for each call

    def at(self, outputs: Iterable[tuple[str, Tensor]]) -> None:
        """Hook the named outputs of one call, to keep a few rows of their gradients."""
        rows: dict[str, Tensor] = {}
        for name, output in outputs:
            output.register_hook(kept_out(partial(self._keep, rows, name), self._failed))

    def looks(self) -> set[Hashable]:
        """Return what `Call.look` would, for each call whose outputs got gradients."""
        return {look("", rows) for rows in self._calls}

    def clear(self) -> None:
        """Forget the calls of the last step."""
        self._calls.clear()

    def _keep(self, rows: dict[str, Tensor], name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._calls += [] if rows else [rows]
            rows[name] = few(gradient.detach()).clone()


def few(gradient: Tensor) -> Tensor:
    """Return the first rows of a gradient."""
    return gradient[:_ROWS] if gradient.ndim else gradient


def look(
    function: str, rows: Mapping[str, Tensor], known: Mapping[str, int | None] | None = None
) -> Hashable:
    """Return what identifies the loss of a call without running the call again.

    Args:
        function: Name of a function that was passed to `record`, else empty.
        rows: The first rows of the gradients at its outputs, by their names.
        known: Class axes that are known already, by output name.

    Returns:
        The name, and the class axis of each output. It does not depend on the size of a batch.
    """
    axes = {**(known or {}), **{name: zero_sum_axis(few) for name, few in rows.items()}}
    return function, tuple(sorted(axes.items()))
