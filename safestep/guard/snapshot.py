"""Copy what an optimizer step may change, so that the step can be measured and undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from safestep._warn import warn_user
from safestep.capture.call import Call
from safestep.guard.copies import Copies
from safestep.guard.optimizer_state import OptimizerState
from safestep.guard.redo import rescale, rescale_with_state
from safestep.guard.used_gradient import UsedGradient
from safestep.measure.update import Update


class Snapshot:
    """An ``Undo`` that copies parameters, optimizer state and group options before the step.

    The copies live from `take` to `release`: during the step, when the activations of the forward
    pass are gone, so that they seldom raise the peak of memory. Small copies keep their memory.

    Args:
        optimizer: The optimizer whose step is going to run.

    Attributes:
        params: The parameters that the step may change.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state, self._copies = _NOTHING, _NO_COPIES
        self._spare = self._state, self._copies
        self._gradients: list[tuple[Tensor, Tensor, int, Tensor]] = []
        self._keeps_gradients = True
        self._has_warned = False
        self._used = _NO_GRADIENT
        self.params: list[Tensor] = []

    def take(self) -> None:
        """Copy everything."""
        state, copies = self._spare
        if not state.is_still_of(self._optimizer):
            state = OptimizerState.of(self._optimizer)
        if not copies.fit(state.tensors):
            copies = Copies(state.tensors, state.params)
        copies.fill()
        state.note_options(self._optimizer)
        self._state, self._copies, self.params = state, copies, state.params
        self._used = UsedGradient(self.params)
        if self._keeps_gradients and not state.is_of_torch:
            self._gradients = [
                (p, p.grad, p.grad._version, p.grad.clone()) for p in self.params
                if p.grad is not None
            ]  # fmt: skip
        if copies.uncopied and not self._has_warned:
            self._has_warned = True
            warn_user(
                "SafeStep: the optimizer's state holds tensors that cannot be copied "
                f"({', '.join(sorted(copies.uncopied))}): a step that is undone leaves them as the "
                "step made them. Use an optimizer with plain tensors in its state, if you can."
            )

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update that was made since `take`.

        Args:
            calls: The calls that its gradients were computed from.

        Returns:
            The update.
        """
        copies = self._copies
        change = _Change(copies.after, copies.of_params)
        return _Made(
            calls, self.params, copies.of_params, change,
            is_sharded=copies.are_sharded, copies=copies,
            gradient_obstacle=self._used.obstacle(self._optimizer),
        )  # fmt: skip

    def rescale(self, scale: float) -> None:
        """Make the update `scale` times as long.

        Args:
            scale: Factor of the update.
        """
        if self._state.is_of_torch or not rescale_with_state(
            self._optimizer, (self._state, self._copies), self._restore_all, scale
        ):
            rescale(self._copies.after, self._copies.of_params, scale)
        if isinstance(self._optimizer, LBFGS):
            # It would pair the move it believes in with the next gradient: its steps then grow
            # without end (measured: r to 1e19 within 60 steps).
            self._optimizer.state.clear()

    def restore(self) -> None:
        """Put everything back, bit for bit, into the tensors that it came from."""
        self._copies.put_back()
        self._state.put_back()

    def _restore_all(self) -> None:
        self.restore()
        for _, gradient, version, copy in self._gradients:
            if gradient._version != version:
                gradient.copy_(copy)

    def release(self) -> None:
        """Free the copies; keep their layout, and the memory of small ones, for the next step."""
        if self._copies is not _NO_COPIES:
            is_kept = self._copies.free()
            self._spare = (self._state, self._copies) if is_kept else (_NOTHING, _NO_COPIES)
        if self._gradients:  # most optimizers leave them as they are
            self._keeps_gradients = any(g._version != v for _, g, v, _ in self._gradients)
        self._state, self._copies, self._gradients, self.params = _NOTHING, _NO_COPIES, [], []
        self._used = _NO_GRADIENT


@dataclass(slots=True)
class _Made(Update):
    """An update that was made: the difference between parameters and their copies."""

    copies: Copies = field(kw_only=True)

    def parts(self) -> list[Tensor]:
        return self.copies.moves()

    @contextmanager
    def at_start(self) -> Iterator[None]:
        change: _Change = self.change  # type: ignore[assignment]
        with Update.at_start(self):
            change.swap()
            try:
                yield
            finally:
                change.swap()


class _Change(Sequence[Tensor]):
    """Lazy sequence of parameter updates; each item is computed when it is accessed.

    Args:
        after: The parameters.
        before: Their values before the update.
    """

    def __init__(self, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        self._after, self._before = after, before

    def swap(self) -> None:
        """Follow an exchange of the contents of `after` and `before`."""
        self._after, self._before = self._before, self._after

    def __len__(self) -> int:
        return len(self._after)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        return self._after[index].detach() - self._before[index].detach()


_NOTHING, _NO_COPIES, _NO_GRADIENT = OptimizerState(), Copies([], []), UsedGradient([])
