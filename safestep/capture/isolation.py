"""Let a module run without a trace."""

from __future__ import annotations

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

from safestep.parallel.shards import reshard

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
    """State of every random generator that a forward pass may draw from.

    Attributes:
        cpu: Of torch's generator for the CPU; None where torch's are left out.
        cuda: Of those of every CUDA device.
        numpy: Of numpy's global generator.
        python: Of Python's; None where this and numpy's are left out.
        own: Other generators, and the state of each.
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
            generators: The others, from ``generators_in``.
            of_torch: Whether those of torch are among the global ones.
            of_host: Whether those of Python and numpy are.

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

    def restore(self) -> None:
        """Write the state back into the generators that it came from."""
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        if self.python is not None:
            np.random.set_state(self.numpy)
            random.setstate(self.python)
        for generator, state in self.own:
            _GENERATORS[type(generator)][1](generator, state)


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
    random_state = RandomState.capture(generators_in(within))
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


def generators_in(within: Iterable[Held]) -> list[Any]:
    """Return the random generators that modules hold.

    Args:
        within: The modules, from ``walk``.

    Returns:
        Generators of torch, numpy and Python.
    """
    return [leaf for _, leaves in within for leaf in leaves if type(leaf) in _GENERATORS]


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
