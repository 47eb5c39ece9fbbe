"""Find the submodules of a module, and the objects that they hold as attributes."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import nn

CONTAINERS = (list, dict, set, deque, tuple)
PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
# nn.Module's own tables (parameters, submodules, hooks), which a forward pass leaves alone.
MODULE_TABLES = frozenset(vars(nn.Module()))


Held = tuple[nn.Module, list[Any]]


def walk(module: nn.Module) -> list[Held]:
    """Return all submodules: those registered and those kept in plain lists, such as a teacher.

    Args:
        module: The root.

    Returns:
        Each module once, with the objects that its attributes hold.
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
    """Return the objects that the attributes of a module hold, those in containers included."""
    queue = [
        value
        for name, value in vars(child).items()
        if name not in MODULE_TABLES and type(value) not in PLAIN
    ]
    if not queue:  # most modules: this runs in every forward pass
        return queue
    leaves = []
    seen: set[int] = set()
    while queue:
        value = queue.pop()
        if not isinstance(value, CONTAINERS):
            leaves.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            queue += changeable(value.values() if isinstance(value, dict) else value)
    return leaves


def changeable(items: Any) -> Any:
    """Return the items of a container, or nothing where all of them are plain numbers or text."""
    # A history of a million floats is passed over at the speed of C.
    return () if PLAIN.issuperset(map(type, items)) else items
