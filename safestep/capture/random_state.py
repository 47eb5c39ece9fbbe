"""Record the random state and train/eval modes that a forward call depends on."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safestep.capture.attributes import Held, Modes, walk
from safestep.capture.effects import ForwardEffects
from safestep.capture.unused_generators import UnusedGenerators, global_states

# Calls that must have run again without news before less of the next ones is recorded.
_SETTLED = 16


# Generators that a module may hold as attributes: how to read and write their state.
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
}


@dataclass(frozen=True, slots=True)
class RandomState:
    """State of the random generators that a forward pass may draw from.

    Attributes:
        cpu: State of torch's CPU generator; None where torch's generators are left out.
        cuda: States of the generators of all CUDA devices.
        numpy: State of numpy's global generator.
        python: State of ``random``; None where this and numpy's are left out.
        own: Pairs of another generator and its state.
    """

    cpu: Tensor | None
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any
    own: tuple[tuple[Any, Any], ...]

    @classmethod
    def capture(
        cls, generators: Iterable[Any] = (), *, of_torch: bool = True, of_host: bool = True
    ) -> RandomState:
        """Return the state of the global generators and of others.

        Args:
            generators: Other generators, from ``generators_in``.
            of_torch: Whether to include torch's global generators.
            of_host: Whether to include those of ``random`` and numpy.

        Returns:
            The state.
        """
        has_cuda = of_torch and torch.cuda.is_initialized()
        return cls(
            cpu=torch.get_rng_state() if of_torch else None,
            cuda=tuple(torch.cuda.get_rng_state_all()) if has_cuda else (),
            numpy=np.random.get_state() if of_host else None,
            python=random.getstate() if of_host else None,
            own=tuple((each, _GENERATORS[type(each)][0](each)) for each in generators),
        )

    def restore(self, apart_from: Collection[str] = ()) -> None:
        """Write each state back into its generator.

        Args:
            apart_from: What to leave as it is, of "torch" and "host" (``random`` and numpy).
        """
        if self.cpu is not None and "torch" not in apart_from:
            torch.set_rng_state(self.cpu)
        if self.cuda and "torch" not in apart_from:
            torch.cuda.set_rng_state_all(list(self.cuda))
        if self.python is not None and "host" not in apart_from:
            np.random.set_state(self.numpy)
            random.setstate(self.python)
        for generator, state in self.own:
            _GENERATORS[type(generator)][1](generator, state)


def generators_in(within: Iterable[Held]) -> list[Any]:
    """Return the random generators that modules hold.

    Args:
        within: The modules, from ``walk``.

    Returns:
        Generators of torch, numpy and Python.
    """
    return [leaf for _, leaves in within for leaf in leaves if type(leaf) in _GENERATORS]


class CallConditions:
    """Record the random state and train modes of a module's calls, as cheaply as they allow.

    Finding and reading every generator takes as long as a layer of a small module. Re-runs show
    what is needed. After 16 in a row with the same modules, generators and modes and no draw from
    ``random`` or numpy, the next calls record only the module's own generators, and torch's if a
    call drew from those. Every re-run is still checked: the first draw from a generator that was
    not recorded brings the full record back for good.

    Args:
        module: The root module of the calls.

    Attributes:
        needs_graph: Whether calls were seen to compute gradients themselves.

    Example:
        >>> conditions = CallConditions(nn.Dropout())
        >>> state, modes = conditions.record()
        >>> modes
        ([Dropout(p=0.5, inplace=False)], [True])
        >>> with conditions.checked(state, modes) as news:
        ...     _ = random.random()
        >>> news  # it drew, but that was recorded
        []
    """

    def __init__(self, module: nn.Module) -> None:
        self.effects = ForwardEffects(module)
        self.unused_generators = UnusedGenerators()
        self.needs_graph = False
        self._module = module
        self._look()
        self._quiet = 0  # calls that ran again without news, in a row; -1: some drew unrecorded
        self._quiet_modes: Modes = ([], [])  # in which those ran
        self._draws_from_torch = False

    def record(self) -> tuple[RandomState, Modes]:
        """Return the random state and train modes just before a call."""
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
        """Check whether the re-run inside draws from a generator that was not recorded.

        Args:
            state: Its recorded random state, restored just before.
            modes: Its recorded train modes.

        Yields:
            A list, filled at the end with the generators that were drawn from and not recorded.
        """
        news: list[str] = []
        within = walk(self._module)
        recorded = {id(generator) for generator, _ in state.own}
        others = [each for each in generators_in(within) if id(each) not in recorded]
        before, own = global_states(), _states_of(others)
        yield news
        after = global_states()
        drawn = {name for name in before if before[name] != after[name]}
        self.unused_generators.learn(modes, before.keys() - drawn)
        drawn -= self.unused_generators.of(modes)  # by another thread, not by the call
        draws = {
            "torch's generator": "torch" in drawn and state.cpu is None,
            "`random` or numpy.random": "host" in drawn,
            "a generator that its modules did not hold before": _states_of(others) != own,
        }
        self._draws_from_torch |= "torch" in drawn
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
