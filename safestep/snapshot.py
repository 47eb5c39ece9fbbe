"""Layer 3: what an optimizer step may change, copied so that it can be measured and undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import LBFGS, Optimizer

from safestep.gauge import Update
from safestep.replay import Call
from safestep.shards import local

# Elements of a tensor that is copied together with others: by itself it would take longer to
# allocate than to copy.
_SMALL = 2**16


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
        self._params_before = _Copies(self.shards)
        self._state_before = _Copies(tensors)

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update that was made since `take`.

        Args:
            calls: The calls that it was computed from.

        Returns:
            The update.
        """
        self._start = self._params_before.values()
        self._change = list(torch._foreach_sub(self.shards, self._start)) if self.params else []
        return Update(calls, self.params, self._start, self._change)

    def rescale(self, scale: float) -> None:
        """Make the update `scale` times as long.

        Args:
            scale: Factor of the update.
        """
        torch._foreach_copy_(self.shards, self._start)
        torch._foreach_add_(self.shards, self._change, alpha=scale)
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
        self._start: list[Tensor] = []
        self._change: list[Tensor] = []
        self._params_before = self._state_before = _Copies([])
        self._state: dict[Tensor, Any] = {}
        self._options: list[dict[str, Any]] = []


def _regrouped(entry: Any, tensors: list[Tensor]) -> Any:
    # New dicts and lists around the same leaves; the tensors among them are collected.
    if isinstance(entry, Tensor):
        tensors.append(local(entry))
        return entry
    if isinstance(entry, dict):
        return {key: _regrouped(value, tensors) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_regrouped(value, tensors) for value in entry]
    return entry


class _Copies:
    """Copies of tensors, those of small ones in one buffer."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        small: dict[Any, list[Tensor]] = defaultdict(list)
        self._alone: dict[Tensor, Tensor] = {}
        for tensor in tensors:
            if tensor.numel() > _SMALL or tensor.layout is not torch.strided:
                self._alone[tensor] = tensor.clone()
            else:
                small[tensor.device, tensor.dtype].append(tensor)
        # What is flattened alone would not be copied.
        self._buffers = [
            (group, _flatten_dense_tensors(group) if len(group) > 1 else group[0].flatten().clone())
            for group in small.values()
        ]

    def values(self) -> list[Tensor]:
        """Return the copies, in the order of the tensors."""
        copies = dict(self._alone)
        for group, buffer in self._buffers:
            copies.update(zip(group, _unflatten_dense_tensors(buffer, group), strict=True))
        return [copies[tensor] for tensor in self._tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the copies into the tensors."""
        for tensor, copy in zip(self._tensors, self.values(), strict=True):
            tensor.copy_(copy)
