"""Layer 3: what an optimizer step may change, copied so that it can be measured and undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map


class Snapshot:
    """Parameters, optimizer state and group options as they were before a step.

    Args:
        optimizer: The optimizer whose step is going to run.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._params = Copies()
        self._state = Copies()
        self._entries: dict[Tensor, Any] = {}
        self._options: list[dict[str, Any]] = []

    @property
    def params(self) -> list[Tensor]:
        """The parameters that the step may move."""
        return self._params.originals

    @property
    def start(self) -> list[Tensor]:
        """Their values before the step."""
        return self._params.copies

    def take(self) -> None:
        """Copy everything."""
        groups = self._optimizer.param_groups
        self._params.take([p for group in groups for p in group["params"] if p.requires_grad])
        # New containers around the optimizer's own tensors, whose values are copied aside.
        self._entries = {
            param: tree_map(_itself, entry) for param, entry in self._optimizer.state.items()
        }
        self._state.take([t for t in tree_leaves(list(self._entries.values())) if _is_tensor(t)])
        self._options = [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def restore(self) -> None:
        """Put everything back, bit for bit, into the tensors that it came from."""
        self._params.restore()
        self._state.restore()
        self._optimizer.state.clear()
        self._optimizer.state.update(self._entries)
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)


class Copies:
    """Copies of a list of tensors, in memory that is reused while the list stays the same."""

    def __init__(self) -> None:
        self.originals: list[Tensor] = []
        self.copies: list[Tensor] = []

    @torch.no_grad()
    def take(self, originals: list[Tensor]) -> None:
        """Copy `originals`."""
        is_same = len(originals) == len(self.originals) and all(map(_is, originals, self.originals))
        if is_same:
            _copy(self.originals, self.copies)
        else:
            self.originals = originals
            self.copies = [tensor.detach().clone() for tensor in originals]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back."""
        _copy(self.copies, self.originals)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    # One foreach call for each device: the fast path wants a single one, and Adam's counters may
    # live on the CPU.
    for device in {tensor.device for tensor in targets}:
        where = [index for index, tensor in enumerate(targets) if tensor.device == device]
        torch._foreach_copy_([targets[i] for i in where], [sources[i] for i in where])


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other and one.shape == other.shape


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _itself(leaf: Any) -> Any:
    return leaf
