"""What the guard can do with an optimizer step: know its update, scale it, undo it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from safestep.capture.call import Call
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
