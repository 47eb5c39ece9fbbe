"""Copy many tensors quickly: small ones side by side, in memory that is kept between steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import compress
from math import sqrt
from operator import is_
from typing import Any

import torch
from torch import Tensor

from safestep._torch import foreach_copy_, foreach_sub, unflatten_dense_tensors
from safestep.capture.copies import is_plain
from safestep.measure.perturb import in_chunks
from safestep.parallel.norms import each_norm
from safestep.parallel.placements import shares
from safestep.parallel.shards import are_sharded, local, local_parts

# Tensors up to this size are copied together: alone, allocation would take longer than the copy.
_SMALL = 2**16
# The memory of the copies is kept between steps up to this number of elements (64 MiB in float32):
# on a CPU, new pages take as long as the copy itself.
_KEPT = 2**24


class Copies:
    """Copies of tensors, with the distance that the parameters among them have moved since.

    The layout is found once and used again at each step, since it takes as long as the copy itself.

    Args:
        tensors: What to copy.
        params: The parameters among them.

    Attributes:
        before: This rank's part of each parameter, in the memory that it had when copied.
        of_params: The copy of each parameter.
        are_sharded: Whether this rank holds only a shard of some parameter.
        uncopied: The types of tensors that cannot be copied.
    """

    def __init__(self, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._tensors, self._params = tensors, params
        self._after: list[Tensor] | None = None
        self._addresses = _addresses(tensors)
        self.uncopied: set[str] = set()
        # Each once: a state may hold a parameter, or share a tensor with another one.
        own = self._own = {tensor: self._memory(tensor) for tensor in tensors}
        self.before = [own[param] for param in params]
        self.are_sharded = are_sharded(params)
        size = sum(map(Tensor.numel, own.values()))
        is_usual = not torch.is_inference_mode_enabled()  # tensors made there cannot be written to
        self._can_be_kept = is_usual and all(map(is_plain, tensors))
        are_params = dict.fromkeys(self.before)
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
        self._large = self._copied(large)
        self._places = dict(zip(*self._large, strict=True))
        for pack in self._packs:
            self._places.update(_parts(pack.copies, pack.tensors))
        self.of_params = [self._places[param] for param in self.before]
        # Large parameters, or where ranks hold shards all, of which each counts its share.
        are_large = dict.fromkeys(self.before if self.are_sharded else large)
        is_apart = [param in are_large for param in self.before]
        self._shares = shares(params)
        self._apart = (
            list(compress(self.before, is_apart)), list(compress(self.of_params, is_apart)),
            list(compress(self._shares, is_apart)),
        )  # fmt: skip
        kept = self._large[1] + [memory for pack in self._packs for memory in pack.memory]
        storages = [copy.untyped_storage() for copy in kept] if self._can_be_kept else []
        # Small copies keep their memory: to ask for it again takes longer than to copy them.
        self._storages = [] if size <= _KEPT else [(each, each.nbytes()) for each in storages]

    @property
    def size(self) -> int:
        """Bytes that the copies take."""
        return sum(copy.numel() * copy.element_size() for copy in self._places.values())

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, at the same addresses."""
        mine = self._tensors
        are_same = len(tensors) == len(mine) and all(map(is_, tensors, mine))
        return are_same and _addresses(tensors) == self._addresses

    def fill(self) -> None:
        """Copy the tensors as they are now."""
        self._after = None
        for storage, size in self._storages:
            if storage.nbytes() != size:
                storage.resize_(size)
        for pack in self._packs:
            pack.fill()
        tensors, copies = self._large
        if tensors:
            foreach_copy_(copies, tensors)

    def free(self) -> bool:
        """Give the memory of large copies back until `fill`.

        Returns:
            Whether the layout serves the next step too.
        """
        for storage, _ in self._storages:
            storage.resize_(0)
        # Rebound parameters would keep the memory that they had alive until the next step.
        return self._can_be_kept and self.after is self.before

    @property
    def after(self) -> list[Tensor]:
        """This rank's part of each parameter, in the memory that it has now.

        ``param.data = ...`` gives a parameter other memory.
        """
        if self._after is None:  # not asked for since the step
            is_there = _addresses(self._params) == self._addresses[: len(self._params)]
            self._after = self.before if is_there else self._parts()
        return self._after

    def _parts(self) -> list[Tensor]:
        return list(map(_without_graph, local_parts(self._params)))

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the copy of a tensor, None if there is none."""
        own = self._own.get(tensor)
        return None if own is None else self._places.get(own)

    def put_back(self) -> None:
        """Give the tensors the memory that they had, and write the copies into it."""
        for tensor, own in self._own.items():
            if is_plain(tensor) and (
                tensor.data_ptr() != own.data_ptr() or tensor.stride() != own.stride()
            ):
                tensor.data = own
            if own in self._places:
                own.copy_(self._places[own])

    def moves(self) -> list[Tensor]:
        """Return tensors whose joint 2-norm is the distance that the parameters have moved since.

        Returns:
            Moves of small parameters, valid until the next call, and norms of large ones.
        """
        moves, (apart, copies, apart_shares) = [], self._apart
        if (after := self.after) is not self.before:
            apart, copies, apart_shares = after, self.of_params, self._shares
        elif not self.are_sharded:
            moves += [pack.move() for pack in self._packs if pack.params]
        for share in dict.fromkeys(apart_shares):
            here = [each == share for each in apart_shares]
            for ends, starts in in_chunks(list(compress(apart, here)), compress(copies, here)):
                norms = each_norm(foreach_sub(ends, starts))
                moves += norms if share == 1 else [norm * sqrt(share) for norm in norms]
        return moves

    def _memory(self, tensor: Tensor) -> Tensor:
        # An alias stays with this memory when the tensor gets another; a subclass may have none.
        return tensor.detach() if is_plain(tensor) else _without_graph(local(tensor))

    def _copied(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that can be copied, and memory for their copies."""
        able, copies = [], []
        for tensor in tensors:
            try:
                copy = torch.empty_like(tensor)
                if not is_plain(tensor):
                    copy.copy_(tensor)
            except Exception:
                if is_plain(tensor):
                    raise
                self.uncopied.add(type(tensor).__name__)
                continue
            able.append(tensor)
            copies.append(copy)
        return able, copies


class _Pack:
    """Small contiguous tensors of one dtype and device, which one call copies side by side.

    Args:
        tensors: The tensors, parameters first.
        params: The parameters among them.
    """

    def __init__(self, tensors: list[Tensor], params: list[Tensor]) -> None:
        self.tensors, self.params = tensors, params
        # Kept, since to flatten them takes longer than to copy them.
        self._flat = [tensor.view(-1) for tensor in tensors]
        self._flat_params = self._flat[: len(params)]
        self.copies = self._flat[0].new_empty(sum(map(Tensor.numel, tensors)))
        self._start = self.copies[: sum(map(Tensor.numel, params))]
        self._move = torch.empty_like(self._start)
        self.memory = self.copies, self._move

    def fill(self) -> None:
        """Copy the tensors as they are now."""
        torch.cat(self._flat, out=self.copies)

    def move(self) -> Tensor:
        """Return the flat move of the parameters since `fill`, valid until the next call."""
        return torch.cat(self._flat_params, out=self._move).sub_(self._start)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    if _WHOLE.issuperset(map(type, tensors)):
        try:
            return list(map(Tensor.data_ptr, tensors))
        except RuntimeError:  # a sparse one has no address
            pass
    return list(map(_address, tensors))


def _address(tensor: Tensor) -> int:
    try:
        return local(tensor).data_ptr()
    except Exception:  # a tensor subclass need not have one
        return 0


_WHOLE = frozenset((Tensor, torch.nn.Parameter))


def _parts(packed: Tensor, tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tensors, unflatten_dense_tensors(packed, tensors), strict=True)


def _without_graph(tensor: Tensor) -> Tensor:
    # To leave gradient mode at every step would take longer than to copy small tensors.
    return tensor.detach() if tensor.requires_grad else tensor
