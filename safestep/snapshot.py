"""Layer 3: what an optimizer step may change, copied so that it can be measured and undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import LBFGS, Optimizer

from safestep.gauge import Lazy, Update
from safestep.norms import each_norm
from safestep.replay import Call
from safestep.shards import is_sharded, local

# Elements of a tensor that is copied together with others: by itself it would take longer to
# allocate than to copy.
_SMALL = 2**16
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may not know what to do


class Snapshot:
    """Parameters, optimizer state and group options as they were before a step.

    The copies live from `take` to `release`: during the step, when the activations of the forward
    pass are gone, so that they seldom raise the peak of memory.

    Args:
        optimizer: The optimizer whose step is going to run.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.release()

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything."""
        groups = self._optimizer.param_groups
        # A frozen parameter that still has a gradient is stepped all the same.
        self.params = [
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
        self._options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.shards = [local(param) for param in self.params]
        self._params_before = _Packed(self.shards)
        self._state_before = _Packed(tensors)

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update that was made since `take`.

        Args:
            calls: The calls that it was computed from.

        Returns:
            The update.
        """
        before = self._params_before
        moves = before.moves()
        self._start = Lazy(before.values)
        self._change = Lazy(lambda: before.unpacked(moves))
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
        self._params_before.put_back()
        self._state_before.put_back()
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)

    def release(self) -> None:
        """Free the copies."""
        self.params: list[Tensor] = []
        self.shards: list[Tensor] = []
        self._start: Sequence[Tensor] = []
        self._change: Sequence[Tensor] = []
        self._params_before = self._state_before = _Packed([])
        self._state: dict[Tensor, Any] = {}
        self._options: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True)
class _Made(Update):
    """An update whose norm is found before it is unpacked."""

    moves: Sequence[Tensor] = ()

    def norms(self) -> list[Tensor]:
        if any(map(is_sharded, self.params)):
            return Update.norms(self)
        return each_norm(self.moves)


class _Packed:
    """Copies of tensors, those of small ones in one buffer."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors = list(map(local, tensors))
        small: dict[Any, list[Tensor]] = defaultdict(list)
        self._groups: list[list[Tensor]] = []
        for tensor in tensors:
            is_plain = type(tensor) in _PLAIN and tensor.layout is torch.strided
            if is_plain and tensor.numel() <= _SMALL:
                small[tensor.device, tensor.dtype].append(tensor)
            else:
                self._groups.append([tensor])
        self._groups += small.values()
        # One that is flattened alone would not be copied.
        self._buffers = [
            group[0].clone() if len(group) == 1 else _flatten_dense_tensors(group)
            for group in self._groups
        ]

    def moves(self) -> list[Tensor]:
        """Return by how much the tensors have changed since, packed as the copies are."""
        return [
            group[0] - buffer if len(group) == 1 else _flatten_dense_tensors(group).sub_(buffer)
            for group, buffer in zip(self._groups, self._buffers, strict=True)
        ]

    def unpacked(self, buffers: list[Tensor]) -> list[Tensor]:
        """Return what is packed as the copies are, in the order of the tensors."""
        found: dict[Tensor, Tensor] = {}
        for group, buffer in zip(self._groups, buffers, strict=True):
            if len(group) == 1:
                found[group[0]] = buffer
            else:
                copies = _unflatten_dense_tensors(buffer, group)
                found.update(zip(group, copies, strict=True))
        return [found[tensor] for tensor in self._tensors]

    def values(self) -> list[Tensor]:
        """Return the copies, in the order of the tensors."""
        return self.unpacked(self._buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the copies into the tensors."""
        for tensor, value in zip(self._tensors, self.values(), strict=True):
            tensor.copy_(value)


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
