"""What an optimizer may change in a step, and whether that is still what it was."""

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
class Holdings:
    """Parameters and state of an optimizer, in containers of their own.

    Attributes:
        params: The parameters that a step may move.
        tensors: These, and the tensors of the state.
        owners: The keys of the state.
        entries: The values of the state: new containers around the optimizer's own leaves.
        leaves: All that the optimizer holds in a row; None where that does not tell whether it
            holds the same at another step.
    """

    params: list[Tensor]
    tensors: list[Tensor]
    owners: list[Any]
    entries: list[Any]
    leaves: list[Any] | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Holdings:
        """Return what an optimizer holds now."""
        every = _params(optimizer)
        # A frozen parameter that still has a gradient is stepped all the same.
        params = [param for param in every if param.requires_grad or param.grad is not None]
        tensors = list(params)
        entries = [_regrouped(entry, tensors) for entry in optimizer.state.values()]
        holdings = cls(params, tensors, list(optimizer.state), entries)
        values = _values(optimizer)
        if len(params) == len(every) and values and _TENSORS.issuperset(map(type, values)):
            holdings.leaves = [*every, *optimizer.state, *values]
        return holdings

    def are_still_of(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer surely holds just these; quicker than to list them again."""
        if self.leaves is None:
            return False
        leaves, values = _params(optimizer), _values(optimizer)
        if values is None or not all(map(_requires_grad, leaves)):
            return False
        leaves += optimizer.state
        leaves += values
        return len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))

    def put_back(self, optimizer: Optimizer) -> None:
        """Let an optimizer hold these again; the values of the tensors stay as they are."""
        optimizer.state.clear()
        optimizer.state.update(zip(self.owners, self.entries, strict=True))
        self.leaves = None  # the containers are the optimizer's now, and it may fill them anew


def _params(optimizer: Optimizer) -> list[Tensor]:
    return list(chain.from_iterable([group["params"] for group in optimizer.param_groups]))


def _values(optimizer: Optimizer) -> list[Any] | None:
    """Return the values of the state's dicts; None where its entries are not just dicts."""
    entries = list(optimizer.state.values())
    if not _DICTS.issuperset(map(type, entries)):
        return None
    return list(chain.from_iterable(map(dict.values, entries)))


def _regrouped(entry: Any, tensors: list[Tensor]) -> Any:
    """Return new dicts and lists around the same leaves, whose tensors are added to `tensors`."""
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
