"""Layer 1: let a module run without a trace."""

from __future__ import annotations

import ctypes
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safestep.shards import reshard

_CONTAINERS = (list, dict, set, deque, tuple)
_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
# nn.Module's own tables (parameters, submodules, hooks), which a forward pass leaves alone.
_MODULE_TABLES = frozenset(vars(nn.Module()))

# How to read and write the state of a generator that a module may hold as an attribute.
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
    """State of every random generator that a forward pass may draw from."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any
    own: tuple[tuple[Any, Any], ...]

    @classmethod
    def capture(
        cls, within: Iterable[Held] = (), numpy_state: Callable[[], Any] = np.random.get_state
    ) -> RandomState:
        """Return the state of the global generators and of those that modules hold.

        Args:
            within: The modules, from ``walk``.
            numpy_state: What gives the state of numpy's global generator.

        Returns:
            The state.
        """
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
        return cls(
            cpu=torch.get_rng_state(),
            cuda=tuple(cuda),
            numpy=numpy_state(),
            python=random.getstate(),
            own=tuple(
                (leaf, _GENERATORS[type(leaf)][0](leaf))
                for _, leaves in within
                for leaf in leaves
                if type(leaf) in _GENERATORS
            ),
        )

    def restore(self) -> None:
        """Write the state back into the generators that it came from."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        if recent_numpy_state() is not self.numpy:
            np.random.set_state(self.numpy)
        random.setstate(self.python)
        for generator, state in self.own:
            _GENERATORS[type(generator)][1](generator, state)


_STATE_BYTES = 4 * (624 + 1)  # of a Mersenne twister: its words, and how many are used up
_latest_numpy: tuple[bytes, Any] = (b"", None)


def recent_numpy_state() -> Any:
    """Return ``np.random.get_state()``, which takes 40 us, asking only where it may have changed.

    Its words are compared with those at the last call. A normal number that numpy keeps for the
    next draw is not among them: while there is one, numpy is always asked. Only a ``set_state``
    that gives such a number to words that had none stays unseen.

    Returns:
        The state of numpy's global generator.
    """
    global _latest_numpy
    generator = np.random.mtrand._rand._bit_generator
    if type(generator) is not np.random.MT19937:
        return np.random.get_state()
    words = ctypes.string_at(generator.ctypes.state_address, _STATE_BYTES)
    if words != _latest_numpy[0]:
        state: Any = np.random.get_state()
        _latest_numpy = (b"" if state[3] else words, state)
    return _latest_numpy[1]


@contextmanager
def untraced(module: nn.Module) -> Iterator[None]:
    """Let `module` run inside without a trace: everything it may change is put back afterwards.

    Put back are buffers (contents, bindings, version counters), attributes of every submodule
    (tensors, arrays, lists, dicts, counters, train/eval flags) and the state of every random
    generator, those in attributes included. The original objects are kept out of reach and copies
    put in their place; a view of a parameter becomes a fresh view of it, which carries its tangent.
    Compiled code runs eagerly inside.

    Out of reach are objects of other classes that a module holds, and what its code does to the
    world outside.

    Args:
        module: The root of the modules that are protected.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If a forward call would write into a parameter.
    """
    within = walk(module)
    children = [child for child, _ in within]
    _refuse_writers(children)
    reshard(module)
    random_state = RandomState.capture(within)
    saved = [(child, dict(vars(child)), dict(child._buffers)) for child in children]
    try:
        _put_copies(saved, _Copier(module))
        torch.clear_autocast_cache()
        with _eager():
            yield
    finally:
        torch.clear_autocast_cache()
        reshard(module)
        for child, attributes, buffers in saved:
            vars(child).clear()
            vars(child).update(attributes)
            _rebind(child, buffers)
        random_state.restore()


class _Copier:
    """Copies what a forward pass may change, each object once, so that what is shared stays so."""

    def __init__(self, module: nn.Module) -> None:
        self._copies: dict[int, Any] = {}
        self._owners = {
            param.untyped_storage().data_ptr(): param
            for param in module.parameters()
            if type(param) is nn.Parameter
        }

    def copied(self, value: Any) -> Any:
        """Return a copy of `value`, or `value` if nothing in it can change."""
        if isinstance(value, nn.Parameter) or not isinstance(
            value, (Tensor, np.ndarray, *_CONTAINERS)
        ):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = value  # where a container holds itself
            self._copies[id(value)] = self._fresh(value)
        return self._copies[id(value)]

    def _fresh(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, tuple):
            items = tuple(map(self.copied, _changeable(value))) or value
            return items if type(value) is tuple else value
        duplicate = copy(value)
        if isinstance(value, dict):
            duplicate.update({key: self.copied(item) for key, item in value.items()})
        elif isinstance(value, (list, deque)):
            for index, item in enumerate(_changeable(value)):
                duplicate[index] = self.copied(item)
        return duplicate

    def _tensor(self, tensor: Tensor) -> Tensor:
        is_strided = type(tensor) is Tensor and tensor.layout is torch.strided
        owner = self._owners.get(tensor.untyped_storage().data_ptr()) if is_strided else None
        if owner is None or owner.dtype != tensor.dtype or tensor.numel() == 0:
            return tensor.detach().clone()
        return owner.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _put_copies(
    saved: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]], copier: _Copier
) -> None:
    for child, attributes, buffers in saved:
        for name, value in attributes.items():
            if name not in _MODULE_TABLES and type(value) not in _PLAIN:
                vars(child)[name] = copier.copied(value)
        _rebind(child, {name: copier.copied(buffer) for name, buffer in buffers.items()})


def _rebind(child: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    if isinstance(child, torch.jit.ScriptModule):
        for name, buffer in buffers.items():  # its table takes no other operation
            child._buffers[name] = buffer
        return
    child._buffers.clear()
    child._buffers.update(buffers)


Held = tuple[nn.Module, list[Any]]


def walk(module: nn.Module) -> list[Held]:
    """Walk through registered submodules and those kept in plain lists, such as a teacher.

    Args:
        module: The root.

    Returns:
        Every module once, with what it holds as attributes.
    """
    found: dict[nn.Module, list[Any]] = {}
    queue: list[nn.Module | None] = [module]
    for child in queue:
        if child is not None and child not in found:
            found[child] = leaves = _held(child)
            queue += (leaf for leaf in leaves if isinstance(leaf, nn.Module))
            queue += child._modules.values()
    return list(found.items())


def _held(child: nn.Module) -> list[Any]:
    """Return the attributes of a module that are not plain numbers, and those in containers."""
    queue = [
        value
        for name, value in vars(child).items()
        if name not in _MODULE_TABLES and type(value) not in _PLAIN
    ]
    if not queue:  # most modules: this runs in every forward pass
        return queue
    leaves = []
    seen: set[int] = set()
    while queue:
        value = queue.pop()
        if not isinstance(value, _CONTAINERS):
            leaves.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            queue += _changeable(value.values() if isinstance(value, dict) else value)
    return leaves


def _changeable(items: Any) -> Any:
    # A history of a million floats is passed over at the speed of C.
    return () if _PLAIN.issuperset(map(type, items)) else items


def _refuse_writers(children: list[nn.Module]) -> None:
    for child in children:
        if vars(child).get("max_norm") is not None and "num_embeddings" in vars(child):
            raise RuntimeError(
                f"{type(child).__name__}(max_norm={child.max_norm}) writes into its weight in "
                "every forward call, so a call cannot be run again without changing the model"
            )


@contextmanager
def _eager() -> Iterator[None]:
    # Importing dynamo takes seconds: where nothing was compiled it is not loaded.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
