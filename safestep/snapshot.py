"""Layer 3: what an optimizer step may change, copied so that it can be measured and undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import LBFGS, Optimizer

from safestep.gauge import Lazy, Update
from safestep.replay import Call
from safestep.shards import is_sharded, local

# Elements of a tensor that is copied together with others: by itself it would take longer to
# allocate than to copy.
_SMALL = 2**16
# Elements of all tensors together whose copies' memory is kept from step to step.
_KEPT = 2**20
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may not know what to do


class Snapshot:
    """Parameters, optimizer state and group options as they were before a step.

    The copies live from `take` to `release`: during the step, when the activations of the forward
    pass are gone, so that they seldom raise the peak of memory. The memory of small ones is kept.

    Args:
        optimizer: The optimizer whose step is going to run.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._copies = self._spare = _NONE
        self.release()

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything."""
        groups = self._optimizer.param_groups
        # A frozen parameter that still has a gradient is stepped all the same.
        params = [
            param
            for group in groups
            for param in group["params"]
            if param.requires_grad or param.grad is not None
        ]
        # New containers around the optimizer's own tensors, whose values are copied aside.
        tensors: list[Tensor] = []
        self._state = {
            param: _regrouped(entry, tensors) for param, entry in self._optimizer.state.items()
        }
        self._options = [dict(group) for group in groups]
        is_fit = self._spare.are_of([*params, *tensors])
        self._copies = self._spare if is_fit else _Copies(params, tensors)
        self._copies.fill()
        self.params, self.shards = params, self._copies.shards

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update that was made since `take`.

        Args:
            calls: The calls that it was computed from.

        Returns:
            The update.
        """
        copies = self._copies
        moves = copies.moves()
        self._start = Lazy(copies.params)
        self._change = Lazy(lambda: copies.unpacked(moves))
        return _Made(calls, self.params, self._start, self._change, moves=moves)

    def rescale(self, scale: float) -> None:
        """Make the update `scale` times as long.

        Args:
            scale: Factor of the update.
        """
        torch._foreach_copy_(self.shards, list(self._start))
        torch._foreach_add_(self.shards, list(self._change), alpha=scale)
        if isinstance(self._optimizer, LBFGS):
            # It would pair the move it believes in with the next gradient: its steps then grow
            # without end (measured: r to 1e19 within 60 steps).
            self._optimizer.state.clear()

    def restore(self) -> None:
        """Put everything back, bit for bit, into the tensors that it came from."""
        self._copies.put_back()
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)

    def release(self) -> None:
        """Free the copies."""
        if self._copies is not _NONE:
            self._spare = self._copies if self._copies.are_small else _NONE
        self._copies = _NONE
        self.params: list[Tensor] = []
        self.shards: list[Tensor] = []
        self._start: Sequence[Tensor] = []
        self._change: Sequence[Tensor] = []
        self._state: dict[Tensor, Any] = {}
        self._options: list[dict[str, Any]] = []


@dataclass(slots=True)
class _Made(Update):
    """An update whose norm is found before it is unpacked."""

    moves: Sequence[Tensor] = ()

    def parts(self) -> list[Tensor]:
        if any(map(is_sharded, self.params)):
            return Update.parts(self)
        return list(self.moves)


class _Copies:
    """Memory for copies of tensors, those of small ones side by side in one buffer.

    To find a place for each takes as long as to copy small ones, so it is done once for all steps.

    Args:
        params: Parameters.
        state: Other tensors.
    """

    def __init__(self, params: list[Tensor], state: list[Tensor]) -> None:
        self._tensors = [*params, *state]
        self.shards = list(map(local, params))
        # Each once: a state may hold a parameter, or share a tensor with another one.
        self._all = list(dict.fromkeys([*self.shards, *map(local, state)]))
        size = sum(map(Tensor.numel, self._all))
        self.are_small = size <= _KEPT and all(map(_is_plain, self._tensors))
        are_params = dict.fromkeys(self.shards)
        small: dict[Any, list[Tensor]] = defaultdict(list)
        places: dict[Tensor, Tensor] = {}
        for tensor in self._all:
            if _is_plain(tensor) and tensor.numel() <= _SMALL:
                small[tensor.device, tensor.dtype].append(tensor)
            else:
                places[tensor] = torch.empty_like(tensor)
        # Parameters that are copied together, first in their buffer, and their copies there.
        self._packed = [([param], places[param]) for param in are_params if param in places]
        for group in small.values():
            buffer = group[0].detach().new_empty(sum(map(Tensor.numel, group)))
            places.update(zip(group, _unflatten_dense_tensors(buffer, group), strict=True))
            packed = [tensor for tensor in group if tensor in are_params]
            size = sum(map(Tensor.numel, packed))
            if len(packed) > 1:
                self._packed.append((packed, buffer[:size]))
            elif packed:
                self._packed.append((packed, places[packed[0]]))
        self._places = [places[tensor] for tensor in self._all]
        self._of_params = [places[param] for param in self.shards]
        # Numbers of another dtype or shape that are put into a parameter lie elsewhere.
        self._addresses = list(map(Tensor.data_ptr, self._all)) if self.are_small else []

    def are_of(self, tensors: list[Tensor]) -> bool:
        """Return whether there is a place for just these tensors."""
        is_same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return is_same and list(map(Tensor.data_ptr, self._all)) == self._addresses

    def fill(self) -> None:
        """Copy the tensors as they are now."""
        if self._all:
            torch._foreach_copy_(self._places, self._all)

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the copies into the tensors."""
        for tensor, copy in zip(self._all, self._places, strict=True):
            tensor.copy_(copy)

    def params(self) -> list[Tensor]:
        """Return the copies of the parameters, in their order."""
        return self._of_params

    def moves(self) -> list[Tensor]:
        """Return by how much the parameters have changed since, packed as the copies are."""
        return [
            params[0] - copy if len(params) == 1 else _flatten_dense_tensors(params).sub_(copy)
            for params, copy in self._packed
        ]

    def unpacked(self, moves: list[Tensor]) -> list[Tensor]:
        """Return the moves of the parameters, in their order."""
        found: dict[Tensor, Tensor] = {}
        for (params, _), move in zip(self._packed, moves, strict=True):
            parts = [move] if len(params) == 1 else _unflatten_dense_tensors(move, params)
            found.update(zip(params, parts, strict=True))
        return [found[param] for param in self.shards]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


_NONE = _Copies([], [])


def _regrouped(entry: Any, tensors: list[Tensor]) -> Any:
    # New dicts and lists around the same leaves; the tensors among them are collected.
    if isinstance(entry, (dict, list)):
        entry = entry.copy()
        for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry):
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, (dict, list)):
                entry[key] = _regrouped(value, tensors)
    elif isinstance(entry, Tensor):
        tensors.append(entry)
    return entry
