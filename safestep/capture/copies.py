"""Copy objects that a forward pass may change, and tell whether it changed them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safestep.capture.attributes import (
    CONTAINERS,
    PLAIN,
    attributes_of,
    changeable,
    has_attributes,
    items_of,
    leads_to,
)
from safestep.parallel.shards import is_sharded


class Copier:
    """Copy values, each object once, so that what is shared stays shared.

    Containers and objects are copied all through; modules and parameters never, nor objects that
    lead to one of them or that refuse to be copied.

    Args:
        module: The root module whose state is copied.

    Attributes:
        tree: Identities of the modules and parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        params = list(module.parameters())
        self.tree = {*map(id, module.modules()), *map(id, params)}
        self._owners = {
            param.untyped_storage().data_ptr(): param
            for param in params
            if type(param) is nn.Parameter
        }
        self._forget(lambda tensor: tensor.detach().clone())

    def with_tensors(self, tensor: Callable[[Tensor], Tensor]) -> Copier:
        """Return a copier of the same module that copies tensors in another way."""
        other = Copier.__new__(Copier)
        other.tree, other._owners = self.tree, self._owners
        other._forget(tensor)
        return other

    def _forget(self, tensor: Callable[[Tensor], Tensor]) -> None:
        self._copy = tensor
        self._copies: dict[int, Any] = {}
        self._sources: list[Any] = []  # alive as long as their identities are in use

    def adopt(self, values: Sequence[Any], copies: Sequence[Any]) -> None:
        """Take copies that were made elsewhere, one of each value."""
        self._sources += values
        self._copies.update(zip(map(id, values), copies, strict=True))

    def copied(self, value: Any) -> Any:
        """Return a copy of `value`, or `value` if nothing in it can change."""
        if type(value) in PLAIN or isinstance(value, (nn.Module, nn.Parameter)):
            return value
        key = id(value)
        if key not in self._copies:
            self._sources.append(value)
            self._copies[key] = value  # where a container holds itself
            self._copies[key] = self._fresh(value)
        return self._copies[key]

    def _fresh(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, tuple):
            items = tuple(map(self.copied, changeable(value))) or value
            make = getattr(type(value), "_make", None)  # of a named tuple
            return make(items) if make else items if type(value) is tuple else value
        if isinstance(value, CONTAINERS):
            return self._container(value)
        return self._object(value) if has_attributes(type(value)) else value

    def _container(self, value: Any) -> Any:
        duplicate = copy(value)
        if isinstance(value, dict):
            duplicate.update({key: self.copied(item) for key, item in value.items()})
        elif isinstance(value, (list, deque)):
            for index, item in enumerate(changeable(value)):
                duplicate[index] = self.copied(item)
        return duplicate

    def _object(self, value: Any) -> Any:
        if not attributes_of(value) or leads_to(self.tree, value):
            return value
        try:
            duplicate = copy(value)
        except Exception:  # a file, a lock, a handle: no state of a model
            return value
        if duplicate is value:  # one of a kind, as a logger is
            return value
        for name, item in attributes_of(duplicate).items():
            other = self.copied(item)
            if other is item:
                continue
            if name in getattr(duplicate, "__dict__", ()):
                vars(duplicate)[name] = other
            else:
                object.__setattr__(duplicate, name, other)
        return duplicate

    def _tensor(self, tensor: Tensor) -> Tensor:
        if is_sharded(tensor) and tensor.requires_grad:
            return tensor  # stands for a parameter that tensor parallelism left inside DDP
        if type(tensor) is not Tensor or not is_plain(tensor):
            return self._copy(tensor)
        storage = tensor.untyped_storage()
        if tensor.numel() and not storage.nbytes():  # freed, as FullyShardedDataParallel does
            return tensor
        owner = self._owners.get(storage.data_ptr())
        if owner is None or owner.dtype != tensor.dtype or tensor.numel() == 0:
            return self._copy(tensor)
        return owner.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Look:
    """Contents of values at one moment, to tell later which of them changed.

    Args:
        values: The values; what they hold is looked at too.
        tree: Identities of modules and parameters, whose owners are not looked into.
        is_close: Whether to look at the numbers of tensors, beside their version counters. Code
            that writes through ``tensor.data`` counts no version.
    """

    def __init__(self, values: Iterable[Any], tree: Collection[int], *, is_close: bool) -> None:
        self._is_close = is_close
        self._objects: list[Any] = []
        seen: set[int] = set()
        queue = list(values)
        for value in queue:
            if type(value) in PLAIN or isinstance(value, (nn.Module, nn.Parameter)):
                continue
            if id(value) in seen or not _is_copied(value, tree):
                continue
            seen.add(id(value))
            self._objects.append(value)
            if not isinstance(value, (Tensor, np.ndarray)):
                queue += items_of(value) or ()
        self._contents = list(map(_contents, self._objects))
        self._bits = self._look_closely()

    def changed(self) -> dict[int, bool]:
        """Return the identity of every object that changed, and whether numbers in it did."""
        pairs = zip(self._objects, self._contents, strict=True)
        found = {
            id(value): isinstance(value, (Tensor, np.ndarray))
            for value, before in pairs
            if not _are_same(before, _contents(value))
        }
        if self._is_close:
            tensors = self._tensors()
            bits = self._look_closely()
            found.update(
                (id(one), True)
                for one, a, b in zip(tensors, self._bits, bits, strict=True)
                if a != b
            )
        return found

    def _tensors(self) -> list[Tensor]:
        return [each for each in self._objects if isinstance(each, Tensor)]

    def _look_closely(self) -> list[Any]:
        return bits_of(self._tensors()) if self._is_close else []


def reached(value: Any, identities: Collection[int]) -> set[int]:
    """Return which of some objects, given by identity, `value` is or holds."""
    queue, seen = [value], {id(value)}
    for each in queue:
        if isinstance(each, (nn.Module, Tensor, np.ndarray)) or type(each) in PLAIN:
            continue
        for item in items_of(each) or ():
            if id(item) not in seen:
                seen.add(id(item))
                queue.append(item)
    return seen.intersection(identities)


def is_plain(tensor: Any) -> bool:
    """Return whether `tensor` is a strided tensor of torch's own class, with data."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
    )


def only_plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return those of some tensors that are plain."""
    return [tensor for tensor in tensors if is_plain(tensor)]


@torch.no_grad()
def bits_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Return numbers for each tensor that differ if its contents do; None where it is not plain.

    Args:
        tensors: The tensors. They are read once, and the host waits for the result.

    Returns:
        Sums of their bits as integers.
    """
    sums = [_bit_sums(each) if is_plain(each) else None for each in tensors]
    devices = {each.device for each in sums if each is not None}
    read: dict[Any, list[Any]] = {
        device: torch.stack([s for s in sums if s is not None and s.device == device]).tolist()
        for device in devices
    }
    return [None if each is None else read[each.device].pop(0) for each in sums]


def _bit_sums(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    # A sum alone would be blind to a queue that was rolled.
    parts = (bits, bits[: len(bits) // 2], bits[::3])
    return torch.stack([part.sum(dtype=torch.int64) for part in parts])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _is_copied(value: Any, tree: Collection[int]) -> bool:
    if isinstance(value, (Tensor, np.ndarray, *CONTAINERS)):
        return True
    return has_attributes(type(value)) and not leads_to(tree, value)


def _contents(value: Any) -> Any:
    if isinstance(value, Tensor):
        version = -1 if value.is_inference() else value._version
        return [version, value.data_ptr() if is_plain(value) else 0, *value.shape]
    if isinstance(value, np.ndarray):
        return [hash(value.tobytes()), *value.shape]
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, CONTAINERS):
        return list(value)
    attributes = attributes_of(value)
    return [*attributes, *attributes.values()]


def _are_same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Return whether two lists hold the same objects, or equal plain numbers and text."""
    if PLAIN.issuperset(map(type, before)):
        return before == after
    return len(before) == len(after) and all(
        one is other or (type(one) in PLAIN and type(one) is type(other) and one == other)
        for one, other in zip(before, after, strict=True)
    )


def differing(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> list[Any]:
    """Return the keys that one mapping lacks, or whose values are not the same in both."""
    shared = before.keys() & after.keys()
    others = [key for key in shared if not _are_same([before[key]], [after[key]])]
    return [*others, *(before.keys() ^ after.keys())]
