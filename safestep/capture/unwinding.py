"""Undo what a re-run changes around it, even where an exception comes between any two lines.

An interrupt (Ctrl-C) can strike after a context manager has changed something and before the
``with`` statement knows of it. Its exit then runs when Python frees it, at some later time, or
never. So each change is announced before it is made, and the step hook, which knows how everything
was when it began, frees what the interrupt left and undoes what is still announced.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from safestep._torch import exit_dual_level, function_modes, pop_function_mode

if TYPE_CHECKING:
    from typing_extensions import Self

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
        self._handled = sys.exc_info()[1]  # by the caller, before anything of ours ran
        self._found = _as_found()
        self._level = forward_ad._current_level  # of all threads; the rest is this thread's own

    def restore(self, error: BaseException | None = None) -> None:
        """Put back everything that an exception has left otherwise; again if interrupted.

        Args:
            error: The exception. The frames that it passed are cleared: a context manager that one
                of them holds would exit when the exception is freed, long after this.
        """
        for each in self._chain(error):
            clear_frames(each.__traceback__)
        completed(self._restore)

    def settle(self) -> None:
        """Restore what was left by an interrupt that Python dropped while it freed something."""
        if _as_found() != self._found:
            self.restore()

    def interrupt(self, error: BaseException) -> BaseException | None:
        """Return the interrupt that an exception is, or that it took the place of.

        Args:
            error: An exception; one that is raised while an interrupt unwinds hides it.

        Returns:
            KeyboardInterrupt, SystemExit or the like; None where there was none.
        """
        return next((e for e in self._chain(error) if not isinstance(e, Exception)), None)

    def _chain(self, error: BaseException | None) -> Iterator[BaseException]:
        while error is not None and error is not self._handled:
            yield error
            error = error.__context__

    def _restore(self) -> None:
        announced, has_graph, modes = self._found
        while function_modes() > modes:
            pop_function_mode()
        undos = _announced.undos
        while len(undos) > announced:
            with torch.no_grad():
                undos[-1]()
            undos.pop()
        while forward_ad._current_level > self._level:
            _leave_level(forward_ad._current_level)
            forward_ad._current_level -= 1
        if self._level < 0:
            _leave_level(0)  # torch enters a level before it counts it
        torch.set_grad_enabled(has_graph)


def _as_found() -> tuple[int, bool, int]:
    return len(_announced.undos), torch.is_grad_enabled(), function_modes()


class FunctionMode(TorchFunctionMode):
    """A mode whose exit leaves as many modes as its entry found, and never raises.

    torch takes the modes off while it calls one. Where an interrupt keeps them off, the exit of
    torch's class raises, and its error would take the place of the interrupt.
    """

    def __enter__(self) -> Self:
        self._outside = function_modes()
        super().__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        while function_modes() > self._outside:
            pop_function_mode()


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
