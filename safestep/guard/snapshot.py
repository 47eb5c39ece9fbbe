"""What an optimizer step may change, copied so that it can be measured and undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.optim import LBFGS, Optimizer

from safestep.capture.call import Call
from safestep.guard.optimizer_state import Holdings
from safestep.measure.cross_check import Update
from safestep.measure.perturb import in_chunks, is_plain
from safestep.parallel.norms import each_norm
from safestep.parallel.shards import are_sharded, counted_here, local

# Elements of a tensor that is copied together with others: by itself it would take longer to
# allocate than to copy.
_SMALL = 2**16
# Elements of all tensors together whose copies' memory is kept from step to step.
_KEPT = 2**20


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
        held = self._spare.held
        if not held.are_still_of(self._optimizer):
            held = Holdings.of(self._optimizer)
        self._options = list(map(dict.copy, self._optimizer.param_groups))
        self._copies = self._spare if self._spare.are_of(held) else _Copies(held)
        self._copies.held = held
        self._copies.fill()
        self.params, self.shards = held.params, self._copies.shards

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update that was made since `take`.

        Args:
            calls: The calls that it was computed from.

        Returns:
            The update.
        """
        copies = self._copies
        change = _Change(self.shards, copies.of_params)
        return _Made(
            calls, self.params, copies.of_params, change,
            is_sharded=copies.are_sharded, copies=copies,
        )  # fmt: skip

    def rescale(self, scale: float) -> None:
        """Make the update `scale` times as long.

        Args:
            scale: Factor of the update.
        """
        for params, copies in in_chunks(self.shards, self._copies.of_params):
            moves = torch._foreach_sub(params, copies)
            torch._foreach_copy_(params, copies)
            torch._foreach_add_(params, moves, alpha=scale)
            del moves  # before the next are made
        if isinstance(self._optimizer, LBFGS):
            # It would pair the move it believes in with the next gradient: its steps then grow
            # without end (measured: r to 1e19 within 60 steps).
            self._optimizer.state.clear()

    def restore(self) -> None:
        """Put everything back, bit for bit, into the tensors that it came from."""
        self._copies.put_back()
        self._copies.held.put_back(self._optimizer)
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update(options)

    def release(self) -> None:
        """Free the copies."""
        if self._copies is not _NONE:
            self._spare = self._copies if self._copies.are_small else _NONE
        self._copies = _NONE
        self.params: list[Tensor] = []
        self.shards: list[Tensor] = []
        self._options: list[dict[str, Any]] = []


@dataclass(slots=True)
class _Made(Update):
    """An update that is nowhere held as a whole."""

    copies: _Copies = field(kw_only=True)

    def parts(self) -> list[Tensor]:
        return self.copies.moves()

    @contextmanager
    def at_start(self) -> Iterator[None]:
        change: _Change = self.change  # type: ignore[assignment]
        with Update.at_start(self):
            change.turn_round()
            try:
                yield
            finally:
                change.turn_round()


class _Change(Sequence[Tensor]):
    """The update of every parameter, made anew whenever it is looked at, one at a time.

    Args:
        after: The parameters.
        before: Their values before the update.
    """

    def __init__(self, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        self._after, self._before = after, before

    def turn_round(self) -> None:
        """Take note that the contents of the two were exchanged."""
        self._after, self._before = self._before, self._after

    def __len__(self) -> int:
        return len(self._after)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        return self._after[index].detach() - self._before[index].detach()


class _Copies:
    """Memory for copies of tensors, those of small ones side by side.

    To find a place for each takes as long as to copy small ones, so it is done once for all steps.

    Args:
        held: What to copy.

    Attributes:
        held: What is copied.
        shards: What is copied of the parameters.
        of_params: The copies of the parameters, in their order.
        are_small: Whether they are kept for the next step.
        are_sharded: Whether this rank holds but a shard of any parameter.
    """

    def __init__(self, held: Holdings) -> None:
        self.held, self._tensors = held, held.tensors
        # Each once: a state may hold a parameter, or share a tensor with another one.
        own = {tensor: _without_graph(local(tensor)) for tensor in self._tensors}
        self.shards = [own[param] for param in held.params]
        self.are_sharded = are_sharded(held.params)
        size = sum(map(Tensor.numel, own.values()))
        is_usual = not torch.is_inference_mode_enabled()  # what is made there cannot be written to
        self.are_small = is_usual and size <= _KEPT and all(map(is_plain, self._tensors))
        are_params = dict.fromkeys(self.shards)
        small: dict[Any, list[Tensor]] = defaultdict(list)  # parameters first
        large: list[Tensor] = []
        for tensor in own.values():
            is_small = is_plain(tensor) and tensor.numel() <= _SMALL and tensor.is_contiguous()
            group = small[tensor.device, tensor.dtype] if is_small else large
            group.append(tensor)
        self._packs = [
            _Pack(tensors, [tensor for tensor in tensors if tensor in are_params])
            for tensors in small.values()
        ]
        self._large = large, [torch.empty_like(tensor) for tensor in large]
        self._places = dict(zip(*self._large, strict=True))
        for pack in self._packs:
            self._places.update(_parts(pack.copies, pack.tensors))
        self.of_params = [self._places[param] for param in self.shards]
        # What the norm of an update is made of besides the packs: of several ranks, one counts.
        apart = [tensor for tensor in large if tensor in are_params]
        if self.are_sharded:
            apart = list(compress(self.shards, counted_here(held.params)))
        self._apart = apart, [self._places[param] for param in apart]
        # Numbers of another dtype or shape that are put into a parameter lie elsewhere.
        self._addresses = list(map(Tensor.data_ptr, self._tensors)) if self.are_small else []

    def are_of(self, held: Holdings) -> bool:
        """Return whether there is a place for just the tensors of these."""
        tensors, mine = held.tensors, self._tensors
        are_same = len(tensors) == len(mine) and all(map(is_, tensors, mine))
        return are_same and list(map(Tensor.data_ptr, tensors)) == self._addresses

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

    def moves(self) -> list[Tensor]:
        """Return tensors whose joint 2-norm is the distance that the parameters have moved since.

        Returns:
            Small moves, until the next call, and the norms of large ones.
        """
        moves = [pack.move() for pack in self._packs if pack.params and not self.are_sharded]
        for params, copies in in_chunks(*self._apart) if self._apart[0] else ():
            moves += each_norm(torch._foreach_sub(params, copies))
        return moves


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


_NONE = _Copies(Holdings([], [], [], []))
