"""Find every tensor and container that a step of an optimizer may change."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass
from itertools import chain
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from safestep.capture.copies import is_plain
from safestep.parallel.shards import is_sharded, local

_TENSORS, _DICTS = frozenset((Tensor,)), frozenset((dict,))
_CONTAINERS = (dict, list, set, deque)
_SCALARS = frozenset((int, float, bool, str, complex, type(None), torch.dtype, torch.device))
# Attributes that every optimizer has and no step changes; a GradScaler lends the last two.
_NOT_STATE = frozenset(vars(SGD([torch.zeros(1)]))) - {"state", "param_groups"} | {
    "grad_scale", "found_inf",
}  # fmt: skip
_requires_grad = attrgetter("requires_grad")


@dataclass(slots=True)
class OptimizerState:
    """The tensors that a step of an optimizer may change, and the containers that hold them.

    State is looked for in ``optimizer.state``, in the options of its groups and in its attributes,
    those of other optimizers among them included.

    Attributes:
        params: The parameters of the optimizer that a step may move.
        tensors: The parameters, then the tensors of the state, each once.
        optimizers: The optimizer, then those that it holds.
        leaves: What the optimizer holds, in a row, to notice a change by identity; None where it
            holds containers that may change without one.
        is_of_torch: Whether all of these optimizers are torch's own, none of them a subclass.
    """

    params: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    leaves: list[Any] | None = None
    is_of_torch: bool = True
    _contents: list[tuple[Any, Any]] = field(default_factory=list)
    _options: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, optimizer: Any) -> OptimizerState:
        """Return the present state of an optimizer."""
        every = _params(optimizer)
        # A frozen parameter that still has a gradient is stepped all the same.
        params = [param for param in every if param.requires_grad or param.grad is not None]
        search = _Search(every, params)
        search.visit(optimizer)
        tensors, optimizers = list(search.tensors), search.optimizers
        is_of_torch = all(type(each).__module__.startswith("torch.") for each in optimizers)
        state = cls(params, tensors, optimizers, is_of_torch=is_of_torch, _contents=search.contents)
        values = _values(optimizer)
        if len(params) == len(every) and values and _TENSORS.issuperset(map(type, values)):
            others = _others(optimizer)
            if not any(isinstance(other, (*_CONTAINERS, Optimizer)) for other in others):
                state.leaves = [*every, *optimizer.state, *values, *others]
        return state

    def is_still_of(self, optimizer: Any) -> bool:
        """Return whether the optimizer surely holds the same tensors; faster than `of`."""
        if self.leaves is None:
            return False
        leaves, values = _params(optimizer), _values(optimizer)
        if values is None or not all(map(_requires_grad, leaves)):
            return False
        leaves += optimizer.state
        leaves += values
        leaves += _others(optimizer)
        return len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))

    def note_options(self, optimizer: Any) -> None:
        """Note the options of the groups and the plain attributes, which may be new numbers."""
        own = vars(optimizer)
        attributes = {name: value for name, value in own.items() if name not in _NOT_STATE}
        self._options = [(own, attributes)]
        self._options += [(group, group.copy()) for group in optimizer.param_groups]

    def put_back(self) -> None:
        """Give every container its content again; the numbers in the tensors stay as they are."""
        for container, content in chain(self._contents, self._options):
            if isinstance(container, dict):
                for key in [k for k in container if k not in content and k not in _NOT_STATE]:
                    del container[key]
                container.update(content)
            elif isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(content)


class _Search:
    """A walk through what an optimizer holds."""

    def __init__(self, every: list[Tensor], params: list[Tensor]) -> None:
        self.tensors: dict[Tensor, None] = dict.fromkeys(params)
        self.optimizers: list[Any] = []
        self.contents: list[tuple[Any, Any]] = []
        self._params = frozenset(every)
        self._is_in_state = False
        self._seen: set[int] = set()

    def visit(self, value: Any) -> None:
        """Note what a value holds, if a step may change it."""
        if isinstance(value, Tensor):
            self._visit_tensor(value)
        elif type(value) in _SCALARS or id(value) in self._seen:
            return
        elif isinstance(value, _CONTAINERS):
            self._keep(value)
            self._visit_all(value.values() if isinstance(value, dict) else list(value))
        elif isinstance(value, tuple):
            self._visit_all(value)
        elif isinstance(value, Optimizer) or is_optimizer_like(value):
            self._visit_optimizer(value)
        elif _is_record(value, is_in_state=self._is_in_state):
            self._keep(vars(value))
            self._visit_all(list(vars(value).values()))

    def _visit_all(self, values: Iterable[Any]) -> None:
        values = list(values)
        if not _SCALARS.issuperset(map(type, values)):
            for value in values:
                self.visit(value)

    def _visit_optimizer(self, optimizer: Any) -> None:
        self._seen.add(id(optimizer))
        self.optimizers.append(optimizer)
        outside = self._is_in_state
        attributes = {k: v for k, v in vars(optimizer).items() if k not in _NOT_STATE}
        self.contents.append((vars(optimizer), attributes))
        groups = optimizer.param_groups
        self._keep(groups)
        for group in groups:
            self._keep(group)
            options = {name: value for name, value in group.items() if name != "params"}
            params = [p for p in group["params"] if p.requires_grad or p.grad is not None]
            self._visit_all(chain(params, options.values()))
        self._is_in_state = True
        self.visit(optimizer.state)
        self._is_in_state = False
        self._visit_all(attributes.values())
        self._is_in_state = outside

    def _visit_tensor(self, tensor: Tensor) -> None:
        inner = list(_inner_tensors(tensor))
        if inner and id(tensor) not in self._seen:
            self._keep(vars(tensor), tensor)
            self._visit_all(inner)
        elif not inner and tensor not in self.tensors and tensor not in self._params:
            self.tensors[tensor] = None

    def _keep(self, container: Any, owner: Any = None) -> None:
        self._seen.add(id(container if owner is None else owner))
        kind = next((kind for kind in _CONTAINERS if isinstance(container, kind)), list)
        self.contents.append((container, kind(container)))


def is_optimizer_like(value: Any) -> bool:
    """Return whether an object that is no torch optimizer can be used as one.

    Args:
        value: Any object.

    Returns:
        True where it has groups of parameters, a state and a ``step``.
    """
    if isinstance(value, (type, nn.Module)):
        return False
    groups = getattr(value, "param_groups", None)
    return isinstance(groups, list) and hasattr(value, "state") and callable(
        getattr(value, "step", None)
    )  # fmt: skip


def _is_record(value: Any, *, is_in_state: bool) -> bool:
    """Return whether an object holds state: any data class, and what the state refers to."""
    if isinstance(value, (type, nn.Module)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    if is_dataclass(value) or isinstance(value, SimpleNamespace):
        return True
    return is_in_state and not type(value).__module__.startswith("torch.")


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a tensor subclass without memory of its own is made of."""
    if is_plain(tensor):
        return
    whole = local(tensor)
    if is_sharded(tensor) and is_plain(whole):
        return
    if is_sharded(tensor):
        yield whole
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        yield from (getattr(tensor, name) for name in names)
    elif not _has_memory(tensor):
        yield from (value for value in vars(tensor).values() if isinstance(value, Tensor))


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except Exception:
        return False


def _params(optimizer: Any) -> list[Tensor]:
    return list(chain.from_iterable([group["params"] for group in optimizer.param_groups]))


def _values(optimizer: Any) -> list[Any] | None:
    """Return the values of the state's dicts; None where an entry is not a plain dict."""
    entries = list(optimizer.state.values())
    if not _DICTS.issuperset(map(type, entries)):
        return None
    return list(chain.from_iterable(map(dict.values, entries)))


def _others(optimizer: Any) -> list[Any]:
    """Return the options and attributes that are more than a number or a name."""
    groups = [
        value
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params" and type(value) not in _SCALARS
    ]
    own = [
        value
        for name, value in vars(optimizer).items()
        if type(value) not in _SCALARS and name not in _NOT_QUICK
    ]
    return groups + own


_NOT_QUICK = _NOT_STATE | {"state", "param_groups"}
