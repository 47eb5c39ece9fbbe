"""What a call depends on beside its arguments, recorded as cheaply as it allows."""

from __future__ import annotations

import ctypes
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from safestep.capture.isolation import Held, RandomState, generators_in, walk

# Calls that must have run again without news before less of the next ones is recorded.
_SETTLED = 16

# Modules, and which of them are in train mode.
Modes = tuple[list[nn.Module], list[bool]]


class Surroundings:
    """Random state and train modes of the calls of a module.

    To look through a small module for generators, and to ask all of them for their state, takes as
    long as a layer. Calls that run again show whether there is a need: where 16 in a row met the
    same modules, generators and train modes, and drew nothing from ``random`` and numpy, the next
    ones are recorded without a look, and without torch's generators if none drew from these. All
    that run again are still checked, and the first that draws from what was not recorded ends this
    for good.

    Args:
        module: The root module of the calls.

    Example:
        >>> surroundings = Surroundings(nn.Dropout())
        >>> state, modes = surroundings.record()
        >>> modes
        ([Dropout(p=0.5, inplace=False)], [True])
        >>> with surroundings.checked(state, modes) as news:
        ...     _ = random.random()
        >>> news  # it drew, but that was recorded
        []
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._look()
        self._quiet = 0  # calls that ran again without news, in a row; -1: some drew unrecorded
        self._quiet_modes: Modes = ([], [])  # in which those ran
        self._draws_from_torch = False

    def record(self) -> tuple[RandomState, Modes]:
        """Return what a call that is about to happen depends on."""
        modes = self._modes()
        if self._quiet >= _SETTLED and modes == self._quiet_modes:
            of_torch = self._draws_from_torch
            if not (of_torch or self._generators):
                return _NOTHING, modes
            return RandomState.capture(self._generators, of_torch=of_torch, of_host=False), modes
        self._look()
        return RandomState.capture(self._generators), self._modes()

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
        torchs, host, own = _torch_state(), _host_state(), _states_of(others)
        yield news
        draws_from_torch = _torch_state() != torchs
        draws = {
            "torch's generator": draws_from_torch and state.cpu is None,
            "`random` or numpy.random": _host_state() != host,
            "a generator that its modules did not hold before": _states_of(others) != own,
        }
        self._draws_from_torch |= draws_from_torch
        is_same = not others and {child for child, _ in within} == set(modes[0])
        if is_same and not any(draws.values()):
            is_in_row = modes == self._quiet_modes or self._quiet < 0
            self._quiet, self._quiet_modes = (self._quiet if is_in_row else 0), modes
            self._quiet += self._quiet >= 0
        elif state.python is not None or not any(draws.values()):
            self._quiet = min(self._quiet, 0)  # all was recorded, or is now as it was then
        else:
            news += (where for where, is_so in draws.items() if is_so)
            self._quiet = -1

    def _modes(self) -> Modes:
        return self._children, [child.training for child in self._children]

    def _look(self) -> None:
        within: list[Held] = walk(self._module)
        self._children = [child for child, _ in within]
        self._generators = generators_in(within)


_NOTHING = RandomState.capture(of_torch=False, of_host=False)


def _states_of(generators: list[Any]) -> list[bytes]:
    state = RandomState.capture(generators, of_torch=False, of_host=False)
    return [pickle.dumps(each) for _, each in state.own]


def _torch_state() -> list[bytes]:
    state = RandomState.capture(of_host=False)
    return [each.numpy().tobytes() for each in (state.cpu, *state.cuda) if each is not None]


def _host_state() -> tuple[Any, bytes]:
    """Return what is another one after a draw from ``random`` or numpy.random."""
    numpy = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(numpy) is not np.random.MT19937:
        return random.getstate(), pickle.dumps(numpy.state)
    # To ask numpy for it takes longer than a layer of a small model.
    return random.getstate(), ctypes.string_at(numpy.ctypes.state_address, _MT19937_BYTES)


_MT19937_BYTES = 4 * (624 + 1)  # its words, and how many are used up
