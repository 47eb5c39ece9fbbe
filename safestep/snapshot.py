"""Layer 3: what an optimizer step may change, copied so that it can be measured and undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.optim import LBFGS, Optimizer

from safestep.gauge import Lazy, Update
from safestep.replay import Call
from safestep.shards import are_sharded, local

# Elements of a tensor that is copied together with others: by itself it would take longer to
# allocate than to copy.
_SMALL = 2**16
# Elements of all tensors together whose copies' memory is kept from step to step.
_KEPT = 2**20
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may not know what to do
_TENSORS, _DICTS = frozenset((Tensor,)), frozenset((dict,))


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
        state = self._optimizer.state
        entries, tensors = _regrouped_all(list(state.values()))
        self._state = list(state), entries
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
        self._optimizer.state.update(zip(*self._state, strict=True))
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
        self._state: tuple[list[Tensor], list[Any]] = ([], [])
        self._options: list[dict[str, Any]] = []


@dataclass(slots=True)
class _Made(Update):
    """An update whose norm is found before it is unpacked."""

    moves: Sequence[Tensor] = ()

    def parts(self) -> list[Tensor]:
        if are_sharded(self.params):
            return Update.parts(self)
        return list(self.moves)


class _Copies:
    """Memory for copies of tensors, those of small ones side by side.

    To find a place for each takes as long as to copy small ones, so it is done once for all steps.

    Args:
        params: Parameters.
        state: Other tensors.
    """

    def __init__(self, params: list[Tensor], state: list[Tensor]) -> None:
        self._tensors = [*params, *state]
        # Each once: a state may hold a parameter, or share a tensor with another one.
        own = {tensor: _without_graph(local(tensor)) for tensor in self._tensors}
        self.shards = [own[param] for param in params]
        size = sum(map(Tensor.numel, own.values()))
        is_usual = not torch.is_inference_mode_enabled()  # what is made there cannot be written to
        self.are_small = is_usual and size <= _KEPT and all(map(_is_plain, self._tensors))
        are_params = dict.fromkeys(self.shards)
        small: dict[Any, list[Tensor]] = defaultdict(list)  # parameters first
        large: list[Tensor] = []
        for tensor in own.values():
            is_small = _is_plain(tensor) and tensor.numel() <= _SMALL and tensor.is_contiguous()
            group = small[tensor.device, tensor.dtype] if is_small else large
            group.append(tensor)
        self._packs = [
            _Pack(tensors, [tensor for tensor in tensors if tensor in are_params])
            for tensors in small.values()
        ]
        self._large = large, [torch.empty_like(tensor) for tensor in large]
        self._places = dict(zip(*self._large, strict=True))
        self._large_params = [pair for pair in self._places.items() if pair[0] in are_params]
        for pack in self._packs:
            self._places.update(_parts(pack.copies, pack.tensors))
        # Numbers of another dtype or shape that are put into a parameter lie elsewhere.
        self._addresses = list(map(Tensor.data_ptr, self._tensors)) if self.are_small else []

    def are_of(self, tensors: list[Tensor]) -> bool:
        """Return whether there is a place for just these tensors."""
        is_same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return is_same and list(map(Tensor.data_ptr, tensors)) == self._addresses

    def fill(self) -> None:
        """Copy the tensors as they are now."""
        for pack in self._packs:
            pack.fill()
        tensors, copies = self._large
        if tensors:
            torch._foreach_copy_(copies, tensors)

    def put_back(self) -> None:
        """Write the copies into the tensors."""
        for tensor, copy in self._places.items():
            tensor.copy_(copy)

    def params(self) -> list[Tensor]:
        """Return the copies of the parameters, in their order."""
        return [self._places[param] for param in self.shards]

    def moves(self) -> list[Tensor]:
        """Return by how much the parameters have changed since, packed as the copies are.

        Returns:
            Tensors that the next ``moves`` may write to.
        """
        packed = [pack.move() for pack in self._packs if pack.params]
        return packed + [param - copy for param, copy in self._large_params]

    def unpacked(self, moves: list[Tensor]) -> list[Tensor]:
        """Return the moves of the parameters, in their order."""
        left = iter(moves)
        found: dict[Tensor, Tensor] = {}
        for pack in self._packs:
            if pack.params:
                found.update(_parts(next(left), pack.params))
        found.update(zip((param for param, _ in self._large_params), left, strict=True))
        return [found[param] for param in self.shards]


class _Pack:
    """Copies of small tensors of one kind, side by side, which one call fills.

    Args:
        tensors: The tensors, contiguous.
        params: The first ones of them, which are parameters.
    """

    def __init__(self, tensors: list[Tensor], params: list[Tensor]) -> None:
        self.tensors, self.params = tensors, params
        # Kept, since to flatten them takes longer than to copy them.
        self._flat = [tensor.view(-1) for tensor in tensors]
        self._flat_params = self._flat[: len(params)]
        self.copies = self._flat[0].new_empty(sum(map(Tensor.numel, tensors)))
        self._start = self.copies[: sum(map(Tensor.numel, params))]
        self._move = torch.empty_like(self._start)

    def fill(self) -> None:
        """Copy the tensors as they are now."""
        torch.cat(self._flat, out=self.copies)

    def move(self) -> Tensor:
        """Return by how much the parameters have changed since, flat, until the next call."""
        return torch.cat(self._flat_params, out=self._move).sub_(self._start)


def _parts(packed: Tensor, tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors, _unflatten_dense_tensors(packed, tensors), strict=True)


def _without_graph(tensor: Tensor) -> Tensor:
    # To leave gradient mode at every step would take longer than to copy small tensors.
    return tensor.detach() if tensor.requires_grad else tensor


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


_NONE = _Copies([], [])


def _regrouped_all(entries: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """Return new dicts and lists around the same leaves, and the tensors among these."""
    if _DICTS.issuperset(map(type, entries)):
        leaves = list(chain.from_iterable(map(dict.values, entries)))
        if _TENSORS.issuperset(map(type, leaves)):  # as torch's optimizers have them
            return list(map(dict.copy, entries)), leaves
    tensors: list[Tensor] = []
    return [_regrouped(entry, tensors) for entry in entries], tensors


def _regrouped(entry: Any, tensors: list[Tensor]) -> Any:
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
