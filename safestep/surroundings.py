"""Layer 1: what a call depends on beside its arguments, recorded as cheaply as it allows."""

from __future__ import annotations

import ctypes
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from safestep.untraced import Held, RandomState, generators_in, walk

# Calls that must have run again without news before less of the next ones is recorded.
_SETTLED = 16

Modes = tuple[tuple[nn.Module, bool], ...]


class Surroundings:
    """Random state and train modes of the calls of a module.

    To look through a small module for generators, and to ask Python and numpy for the state of
    theirs, takes as long as a layer. Calls that run again show whether there is a need: where 16 in
    a row met the same modules and generators, and drew nothing from ``random`` and numpy, the next
    ones are recorded without a look. All that run again are still checked, and the first that draws
    from what was not recorded ends this for good.

    Args:
        module: The root module of the calls.

    Example:
        >>> surroundings = Surroundings(nn.Dropout())
        >>> state, modes = surroundings.record()
        >>> modes
        ((Dropout(p=0.5, inplace=False), True),)
        >>> with surroundings.checked(state, modes) as news:
        ...     _ = random.random()
        >>> news  # it drew, but that was recorded
        []
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._look()
        self._quiet = 0  # calls that ran again without news, in a row; -1: some drew unrecorded

    def record(self) -> tuple[RandomState, Modes]:
        """Return what a call that is about to happen depends on."""
        is_settled = self._quiet >= _SETTLED
        if not is_settled:
            self._look()
        state = RandomState.capture(self._generators, of_host=not is_settled)
        return state, tuple((child, child.training) for child in self._children)

    @contextmanager
    def checked(self, state: RandomState, modes: Modes) -> Iterator[list[str]]:
        """Check whether the call that runs inside again depends on more than was recorded.

        Args:
            state: Its recorded random state, restored just before.
            modes: Its recorded train modes.

        Yields:
            A list. Afterwards it tells from where the call drew that is not in its record.
        """
        news: list[str] = []
        within = walk(self._module)
        recorded = {id(generator) for generator, _ in state.own}
        others = [each for each in generators_in(within) if id(each) not in recorded]
        host, own = _host_state(), _states_of(others)
        yield news
        draws = {
            "`random` or numpy.random": _host_state() != host,
            "a generator that its modules did not hold before": _states_of(others) != own,
        }
        is_same = not others and {child for child, _ in within} == {child for child, _ in modes}
        if is_same and not any(draws.values()):
            self._quiet += self._quiet >= 0
        elif state.is_of_host or not any(draws.values()):
            self._quiet = min(self._quiet, 0)  # all was recorded, or is now as it was then
        else:
            news += (where for where, is_so in draws.items() if is_so)
            self._quiet = -1

    def _look(self) -> None:
        within: list[Held] = walk(self._module)
        self._children = [child for child, _ in within]
        self._generators = generators_in(within)


def _states_of(generators: list[Any]) -> list[bytes]:
    return [pickle.dumps(state) for _, state in RandomState.capture(generators, of_host=False).own]


def _host_state() -> tuple[Any, bytes]:
    """Return what is another one after a draw from ``random`` or numpy.random."""
    numpy = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(numpy) is not np.random.MT19937:
        return random.getstate(), pickle.dumps(numpy.state)
    # To ask numpy for it takes longer than a layer of a small model.
    return random.getstate(), ctypes.string_at(numpy.ctypes.state_address, _MT19937_BYTES)


_MT19937_BYTES = 4 * (624 + 1)  # its words, and how many are used up
