"""Layer 3: what an optimizer step may change, copied so that it can be measured and undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from safestep.gauge import Update
from safestep.replay import Call
from safestep.shards import local


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
        self._tensors: list[Tensor] = []
        self._state = {
            param: _regrouped(entry, self._tensors)
            for param, entry in self._optimizer.state.items()
        }
        self._options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.shards = [local(param) for param in self.params]
        self.start = _copies(self.shards)
        self._values = _copies(self._tensors)

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update that was made since `take`.

        Args:
            calls: The calls that it was computed from.

        Returns:
            The update.
        """
        self._change = list(torch._foreach_sub(self.shards, self.start)) if self.params else []
        return Update(calls, self.params, self.start, self._change)

    def rescale(self, scale: float) -> None:
        """Make the update `scale` times as long.

        Args:
            scale: Factor of the update.
        """
        torch._foreach_copy_(self.shards, self.start)
        torch._foreach_add_(self.shards, self._change, alpha=scale)
        if isinstance(self._optimizer, LBFGS):
            # It would pair the move it believes in with the next gradient: its steps then grow
            # without end (measured: r to 1e19 within 60 steps).
            self._optimizer.state.clear()

    def restore(self) -> None:
        """Put everything back, bit for bit, into the tensors that it came from."""
        _copy(self.start, self.shards)
        _copy(self._values, self._tensors)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)

    def release(self) -> None:
        """Free the copies."""
        self.params: list[Tensor] = []
        self.shards: list[Tensor] = []
        self.start: list[Tensor] = []
        self._change: list[Tensor] = []
        self._tensors, self._values = [], []
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


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    _copy(tensors, copies)
    return copies


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    # One foreach call for each device: the fast path wants a single one, and Adam's counters may
    # live on the CPU.
    for device in {tensor.device for tensor in targets}:
        where = [index for index, tensor in enumerate(targets) if tensor.device == device]
        torch._foreach_copy_([targets[i] for i in where], [sources[i] for i in where])
