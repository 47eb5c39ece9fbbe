"""Notice that training goes on without a step of the guarded optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from safestep._warn import warn_user

_PATIENCE = 8  # backward passes without a step, before the parameters are looked at
_MOVES = 16  # of the parameters without a step, before the user is warned


class IdleWatch:
    """Warn once if something else than the guarded optimizer moves its parameters.

    Many backward passes without a step are not unusual: gradients are accumulated, or computed for
    something else. Parameters that move between them are.

    Args:
        params: Returns the trained parameters of the optimizer.
        module: Returns all parameters of the model, of which the optimizer may hold none.

    Attributes:
        is_looking: Whether enough backward passes went by to look at the parameters.
    """

    def __init__(
        self, params: Callable[[], list[Tensor]], module: Callable[[], Iterable[Tensor]]
    ) -> None:
        self._params, self._module = params, module
        self._has_warned = False
        self.stepped()

    def stepped(self) -> None:
        """Begin to count again: the optimizer has stepped."""
        self.is_looking = False
        self._backwards = self._moves = 0
        self._places: list[int] | None = None
        self._has_moved = False

    def before_call(self) -> None:
        """Look whether parameters have moved since the last call ended."""
        if self.is_looking:
            self._has_moved |= self._places is not None and self._places != self._now()

    def after_call(self) -> None:
        """Note where the parameters are, now that a call has ended: it may have moved them."""
        if self.is_looking:
            self._places = self._now()

    def backward(self) -> None:
        """Count a backward pass, and warn where the parameters moved once too often."""
        self._backwards += 1
        self._moves += self._has_moved
        self._has_moved = False
        self.is_looking = self._backwards >= _PATIENCE and not self._has_warned
        if self._moves >= _MOVES and self.is_looking:
            self._has_warned, self.is_looking = True, False
            warn_user(
                f"SafeStep: in {self._backwards} backward passes the optimizer it is attached to "
                "never stepped, yet its parameters moved: nothing is measured. Another optimizer "
                "may have been created since (for unfrozen layers, or a new model), or this one "
                "was copied, or it moves parameters in methods of its own (SAM's first_step and "
                "second_step). Attach SafeStep to the optimizer whose step() is called, such as "
                "SAM's base_optimizer."
            )

    def _now(self) -> list[int]:
        own = set(module := list(self._module()))
        params = [param for param in self._params() if param in own] or module
        return [place for param in params for place in place_of(param)]


def place_of(param: Tensor) -> tuple[int, int]:
    """Return two numbers, of which one changes where a parameter is moved."""
    try:
        return param._version, param.data_ptr()
    except RuntimeError:  # a tensor subclass need not have an address
        return param._version, 0
