"""Move parameters temporarily: to the start of an update, or along a part of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from safestep._torch import foreach_add_, foreach_copy_, foreach_mul_, preserve_versions
from safestep.capture.copies import is_plain
from safestep.capture.unwinding import undone
from safestep.measure.forward_ad import Written
from safestep.parallel.shards import local_parts

# Fewest elements per chunk, and most chunks in total: one chunk at a time is copied.
_CHUNK, _CHUNKS = 2**18, 64
_Chunk = tuple[list[Tensor], list[Tensor]]


@contextmanager
def moved_back(params: Sequence[Tensor], start: Sequence[Tensor]) -> Iterator[None]:
    """Swap the contents of `params` and `start` within the context, bit for bit both ways.

    Args:
        params: The parameters, after the step.
        start: Their values before the step; within the context, those after it.

    Yields:
        Nothing.
    """
    held = tuple(local_parts(params))
    with torch.no_grad(), preserve_versions(held):
        exchange = _Exchange(in_chunks(held, start))
        with undone(exchange.undo):
            exchange.run()
            yield


def displaced_by(
    places: list[Tensor], tangents: Sequence[Tensor], eps: float = 1.0
) -> list[Tensor]:
    """Return places + eps * tangents with little extra memory.

    Args:
        places: Values of the parameters.
        tangents: A direction for each.
        eps: Factor of the tangents.

    Returns:
        New tensors.
    """
    displaced = list(map(torch.empty_like, places))
    if isinstance(tangents, Written):
        tangents.write(displaced)
    else:
        foreach_copy_(displaced, list(tangents))
    if eps != 1.0:
        foreach_mul_(displaced, eps)
    foreach_add_(displaced, places)
    return displaced


class _Exchange:
    """Swap the contents of tensors and swap them back, safely under repeated interrupts.

    Args:
        chunks: Pairs of lists of tensors.
    """

    def __init__(self, chunks: Iterable[_Chunk]) -> None:
        self._chunks = list(chunks)
        # Number of chunks exchanged; for the next chunk, a copy of its first list and whether that
        # list is already overwritten. One attribute, so that the three change together.
        self._state: tuple[int, list[Tensor] | None, bool] = 0, None, False
        self._return: _Exchange | None = None

    def run(self) -> None:
        """Exchange all chunks; continue where an interrupt stopped."""
        while self._state[0] < len(self._chunks):
            self._exchange_one()

    def undo(self) -> None:
        """Put everything back; continue where an interrupt stopped."""
        if self._return is None:
            if self._state[1] is not None:
                self._exchange_one()
            self._return = _Exchange(self._chunks[: self._state[0]])
        with torch.no_grad():
            self._return.run()

    def _exchange_one(self) -> None:
        index, kept, is_overwritten = self._state
        ones, others = self._chunks[index]
        if kept is None:
            kept = [one.detach().clone() for one in ones]
            self._state = index, kept, False
        if not is_overwritten:
            foreach_copy_(ones, others)
            self._state = index, kept, True
        foreach_copy_(others, kept)
        self._state = index + 1, None, False  # frees the copies before the next are made


def in_chunks(left: Sequence[Tensor], right: Iterable[Tensor]) -> Iterator[_Chunk]:
    """Yield the pairs in chunks: large enough to be worth a call, small enough to copy.

    Args:
        left: Tensors.
        right: A tensor of the same shape for each of them.

    Yields:
        A list of tensors of each side, whole or in pieces.
    """
    limit = max(_CHUNK, sum(map(Tensor.numel, left)) // _CHUNKS)
    ones, others, size = [], [], 0
    for one, other in _pieces(left, right, limit):
        ones.append(one)
        others.append(other)
        size += one.numel()
        if size >= limit:
            yield ones, others
            ones, others, size = [], [], 0
    if ones:
        yield ones, others


def _pieces(
    left: Iterable[Tensor], right: Iterable[Tensor], limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(left, right, strict=True):
        if one.numel() <= limit or not (_can_be_split(one) and _can_be_split(other)):
            yield one, other
        else:
            flat = (each.view(-1).split(limit) for each in (one, other))
            yield from zip(*flat, strict=True)


def _can_be_split(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.is_contiguous()  # a subclass may not support views
