"""Learn which global random generators the calls of a module leave alone."""

from __future__ import annotations

import ctypes
import pickle
import random
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from safestep.capture.attributes import Modes

# Calls in the same modes that are looked at, at most.
_TRIES = 64
_MT19937_BYTES = 4 * (624 + 1)  # its words, and how many are used up


class UnusedGenerators:
    """Learn which global generators the calls of a module do not draw from.

    It matters where other threads run. They may draw while a call runs again, and a generator that
    is set to an earlier state, for the call and after it, gives them the same numbers twice. One
    forward pass that leaves a generator as it was shows that calls in these modes do not need it.
    """

    def __init__(self) -> None:
        self._unused: set[str] = set()
        self._modes: Modes | None = None
        self._tries = 0

    def before(self, modes: Modes) -> dict[str, Any] | None:
        """Return the states of the generators before a call; None where nothing is to be learned.

        Args:
            modes: The submodules, and whether each is in train mode.
        """
        if modes != self._modes:
            self._unused, self._modes, self._tries = set(), modes, 0
        self._tries += 1
        return global_states() if self._tries <= _TRIES and len(self._unused) < 2 else None

    def after(self, states: dict[str, Any]) -> None:
        """Learn from a call.

        Args:
            states: What `before` returned for it.
        """
        now = global_states()
        self._unused.update(name for name in states if states[name] == now[name])

    def learn(self, modes: Modes, names: Iterable[str]) -> None:
        """Take note that a call in some modes has not drawn from some generators."""
        if modes == self._modes:
            self._unused.update(names)

    def of(self, modes: Modes) -> frozenset[str]:
        """Return which generators calls in these modes leave alone, while other threads run.

        Args:
            modes: The submodules, and whether each is in train mode.

        Returns:
            Of "torch" and "host", which is ``random`` and numpy.
        """
        is_known = modes == self._modes and threading.active_count() > 1
        return frozenset(self._unused) if is_known else frozenset()


def global_states() -> dict[str, Any]:
    """Return values that change with every draw from torch's generators, and from the others."""
    return {"torch": _torch_state(), "host": _host_state()}


def _torch_state() -> list[bytes]:
    """Return a value that changes with every draw from torch's global generators."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [each.numpy().tobytes() for each in states]


def _host_state() -> tuple[Any, bytes]:
    """Return a value that changes with every draw from ``random`` or numpy.random."""
    numpy = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(numpy) is not np.random.MT19937:
        return random.getstate(), pickle.dumps(numpy.state)
    # To ask numpy for it takes longer than a layer of a small model.
    return random.getstate(), ctypes.string_at(numpy.ctypes.state_address, _MT19937_BYTES)
