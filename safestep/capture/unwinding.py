"""Undo what a re-run changes around it, even where an exception comes between any two lines.

An interrupt (Ctrl-C) can strike after a context manager has changed something and before the
``with`` statement knows of it. Its exit then never runs. So each change is announced before it is
made, and the step hook, which knows how everything was when it began, undoes what is left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

from safestep._torch import exit_dual_level, function_modes, pop_function_mode

_TRIES = 3  # of what an interrupt may strike again


class _Announced(threading.local):
    def __init__(self) -> None:
        self.undos: list[Callable[[], None]] = []


_announced = _Announced()


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` at exit; where an interrupt skips the exit, ``Surroundings.restore`` calls it.

    Args:
        undo: Puts back what is changed inside. It may run again after it was interrupted.

    Yields:
        Nothing.

    Example:
        >>> switch = ["on"]
        >>> with undone(lambda: switch.append("on")):
        ...     switch.append("off")
        >>> switch
        ['on', 'off', 'on']
    """
    undos = _announced.undos
    undos.append(undo)
    try:
        yield
    finally:
        while undo in undos:  # else it was undone from outside
            undos[-1]()  # of an exit further in, if that was interrupted
            undos.pop()


class Surroundings:
    """Gradient mode, forward-mode level and the like, as they are when this is made.

    Example:
        >>> before = Surroundings()
        >>> _ = torch.set_grad_enabled(False)
        >>> before.restore()
        >>> torch.is_grad_enabled()
        True
    """

    def __init__(self) -> None:
        self._announced = len(_announced.undos)
        self._has_graph = torch.is_grad_enabled()
        self._level = forward_ad._current_level
        self._modes = function_modes()

    def restore(self) -> None:
        """Put back everything that an exception has left otherwise; again if interrupted."""
        completed(self._restore)

    def _restore(self) -> None:
        while function_modes() > self._modes:
            pop_function_mode()
        undos = _announced.undos
        while len(undos) > self._announced:
            with torch.no_grad():
                undos[-1]()
            undos.pop()
        while forward_ad._current_level > self._level:
            _leave_level(forward_ad._current_level)
            forward_ad._current_level -= 1
        if self._level < 0:
            _leave_level(0)  # torch enters a level before it counts it
        torch.set_grad_enabled(self._has_graph)


def completed(action: Callable[[], None]) -> None:
    """Run an action to its end, again where it is interrupted, and pass the interrupt on then.

    Args:
        action: What to do. It may run again after it was interrupted.

    Raises:
        BaseException: The last one that the action raised.
    """
    interrupt: BaseException | None = None
    for _ in range(_TRIES):
        try:
            action()
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _leave_level(level: int) -> None:
    # torch also leaves a level before it stops counting it; an interrupt may come between.
    try:
        exit_dual_level(level=level)
    except RuntimeError:
        return  # it was left already
