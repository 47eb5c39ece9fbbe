"""Find the submodules of a module, and the objects that it holds as attributes."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Collection, Iterable
from enum import Enum
from functools import lru_cache
from threading import Thread
from typing import Any

import numpy as np
from torch import Tensor, nn

CONTAINERS = (list, dict, set, deque, tuple)
PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
# nn.Module's own tables (parameters, submodules, hooks), which a forward pass leaves alone.
MODULE_TABLES = frozenset(vars(nn.Module()))
# Where FullyShardedDataParallel notes which all-gathers are under way: no state of a model.
_BOOKKEEPING = frozenset(("_free_event_queue", "_exec_order_data"))

# Objects with attributes that are no state of a forward pass, or are copied in another way.
_NO_STATE = (
    nn.Module, Tensor, np.ndarray, random.Random, type, Enum, Thread, BaseException,
    types.ModuleType, types.FunctionType, types.MethodType,
)  # fmt: skip
# A graph of more objects than this is a program, not the state of a model.
_MAX_OBJECTS = 2000

# A module, and the objects that its attributes hold.
Held = tuple[nn.Module, list[Any]]
# Modules, and which of them are in train mode.
Modes = tuple[list[nn.Module], list[bool]]


def walk(module: nn.Module) -> list[Held]:
    """Return all submodules: registered ones, and those in containers and objects, as a teacher is.

    Args:
        module: The root.

    Returns:
        Each module once, with the objects that its attributes hold.
    """
    found: dict[nn.Module, list[Any]] = {}
    registered = set(map(id, module.modules()))
    seen: set[int] = set()
    queue: list[nn.Module | None] = [module]
    for child in queue:
        if child is not None and child not in found:
            found[child] = leaves = _held(child, registered, seen)
            queue += (leaf for leaf in leaves if isinstance(leaf, nn.Module))
            queue += child._modules.values()
    return list(found.items())


def _held(child: nn.Module, tree: Collection[int], seen: set[int]) -> list[Any]:
    """Return the objects that the attributes of a module hold, those in containers included."""
    ((_, own),) = own_attributes([child])
    queue = list(own.values())
    if not queue:  # most modules: this runs in every forward pass
        return queue
    leaves = []
    while queue:
        value = queue.pop()
        if type(value) in PLAIN:
            continue
        items = items_of(value)
        if items is None:
            leaves.append(value)
        elif id(value) not in seen and not leads_to(tree, value):
            seen.add(id(value))
            queue += items
    return leaves


def own_attributes(children: Iterable[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return each module with those of its attributes that are not nn.Module's own."""
    hidden = MODULE_TABLES | _BOOKKEEPING
    return [
        (child, {name: value for name, value in vars(child).items() if name not in hidden})
        for child in children
    ]


def changeable(items: Iterable[Any]) -> Iterable[Any]:
    """Return the items of a container, or nothing where all of them are plain numbers or text."""
    # A history of a million floats is passed over at the speed of C.
    return () if PLAIN.issuperset(map(type, items)) else items


def items_of(value: Any) -> Iterable[Any] | None:
    """Return what a container or object holds, without plain numbers; None for other values."""
    if isinstance(value, CONTAINERS):
        return changeable(value.values() if isinstance(value, dict) else value)
    if not has_attributes(type(value)):
        return None
    return changeable(attributes_of(value).values())


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    found = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    found.update(getattr(value, "__dict__", ()))
    return found


@lru_cache(maxsize=1024)
def has_attributes(kind: type) -> bool:
    """Return whether objects of a class are copied by their attributes."""
    return not issubclass(kind, _NO_STATE) and bool(kind.__dictoffset__ or _slots(kind))


@lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    slots: list[str] = []
    for base in kind.__mro__:
        own = vars(base).get("__slots__", ())
        slots += (own,) if isinstance(own, str) else own
    return tuple(name for name in slots if not name.startswith("__"))


def leads_to(tree: Collection[int], value: Any) -> bool:
    """Return whether an object leads to a module that it is held by, as a trainer does.

    Args:
        tree: Identities of the modules, and of what else belongs to them.
        value: The object.

    Returns:
        True for one that is not state of the modules but works on them, or is larger than state is.
    """
    if isinstance(value, CONTAINERS):
        return False  # of whose items each is asked
    queue, seen = [value], {id(value)}
    for each in queue:
        for item in items_of(each) or ():
            if id(item) in tree or len(seen) > _MAX_OBJECTS:
                return True
            if id(item) not in seen and type(item) not in PLAIN:
                seen.add(id(item))
                queue.append(item)
    return False
