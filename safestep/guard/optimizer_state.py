"""List the parameters and state tensors of an optimizer, and tell whether they changed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_TENSORS, _DICTS = frozenset((Tensor,)), frozenset((dict,))
_requires_grad = attrgetter("requires_grad")


@dataclass(slots=True)
class OptimizerState:
    """The tensors that an optimizer may change, and the containers that hold its state.

    Attributes:
        params: The parameters that a step may move.
        tensors: The parameters, then the tensors of the state.
        keys: The keys of the state.
        entries: The values of the state: new containers around the optimizer's own leaves.
        leaves: Parameters, keys and state tensors in a row, to notice a change by identity; None
            where the state holds more than that.
    """

    params: list[Tensor]
    tensors: list[Tensor]
    keys: list[Any]
    entries: list[Any]
    leaves: list[Any] | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> OptimizerState:
        """Return the present state of an optimizer."""
        every = _params(optimizer)
        # A frozen parameter that still has a gradient is stepped all the same.
        params = [param for param in every if param.requires_grad or param.grad is not None]
        tensors = list(params)
        entries = [_copied(entry, tensors) for entry in optimizer.state.values()]
        state = cls(params, tensors, list(optimizer.state), entries)
        values = _values(optimizer)
        if len(params) == len(every) and values and _TENSORS.issuperset(map(type, values)):
            state.leaves = [*every, *optimizer.state, *values]
        return state

    def is_still_of(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer surely holds the same tensors; faster than `of`."""
        if self.leaves is None:
            return False
        leaves, values = _params(optimizer), _values(optimizer)
        if values is None or not all(map(_requires_grad, leaves)):
            return False
        leaves += optimizer.state
        leaves += values
        return len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))

    def put_back(self, optimizer: Optimizer) -> None:
        """Give the optimizer these containers and tensors again; the numbers stay as they are."""
        optimizer.state.clear()
        optimizer.state.update(zip(self.keys, self.entries, strict=True))
        self.leaves = None  # the optimizer now owns the containers and may fill them


def _params(optimizer: Optimizer) -> list[Tensor]:
    return list(chain.from_iterable([group["params"] for group in optimizer.param_groups]))


def _values(optimizer: Optimizer) -> list[Any] | None:
    """Return the values of the state's dicts; None where an entry is not a plain dict."""
    entries = list(optimizer.state.values())
    if not _DICTS.issuperset(map(type, entries)):
        return None
    return list(chain.from_iterable(map(dict.values, entries)))


def _copied(entry: Any, tensors: list[Tensor]) -> Any:
    """Return new dicts and lists around the same leaves; append the tensors to `tensors`."""
    if isinstance(entry, (dict, list)):
        entry = entry.copy()
        for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry):
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, (dict, list)):
                entry[key] = _copied(value, tensors)
    elif isinstance(entry, Tensor):
        tensors.append(entry)
    return entry
