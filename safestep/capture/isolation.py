"""Run a module without side effects."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safestep.capture.attributes import CONTAINERS, MODULE_TABLES, PLAIN, changeable, walk
from safestep.capture.random_state import RandomState, generators_in
from safestep.parallel.shards import reshard


@contextmanager
def without_side_effects(module: nn.Module) -> Iterator[None]:
    """Undo, at exit, everything that a run of `module` inside changes.

    Put back are buffers (contents, bindings, version counters), attributes of every submodule
    (tensors, arrays, lists, dicts, counters, train/eval flags) and the state of every random
    generator, those in attributes included. The original objects are kept out of reach and copies
    put in their place; a view of a parameter becomes a fresh view of it, which carries its tangent.
    Compiled code runs eagerly inside.

    Not put back: objects of other classes that a module holds, and effects outside of the module.

    Args:
        module: The root module.

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
    """Copy objects that a forward pass may change, each once, so that shared ones stay shared."""

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
            value, (Tensor, np.ndarray, *CONTAINERS)
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
            items = tuple(map(self.copied, changeable(value))) or value
            return items if type(value) is tuple else value
        duplicate = copy(value)
        if isinstance(value, dict):
            duplicate.update({key: self.copied(item) for key, item in value.items()})
        elif isinstance(value, (list, deque)):
            for index, item in enumerate(changeable(value)):
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
            if name not in MODULE_TABLES and type(value) not in PLAIN:
                vars(child)[name] = copier.copied(value)
        _rebind(child, {name: copier.copied(buffer) for name, buffer in buffers.items()})


def _rebind(child: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    if isinstance(child, torch.jit.ScriptModule):
        for name, buffer in buffers.items():  # its table takes no other operation
            child._buffers[name] = buffer
        return
    child._buffers.clear()
    child._buffers.update(buffers)


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
