"""Real data for the tasks of bench_peers.py: digits, and texts that come with Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from bench_step import _digits, _text
from torch import Tensor

HELD_OUT = 360  # digits


def images(generator: torch.Generator | None, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    inputs, targets = _digits()
    if generator is None:
        return inputs[:HELD_OUT], targets[:HELD_OUT]
    rows = HELD_OUT + torch.randint(len(inputs) - HELD_OUT, (batch_size,), generator=generator)
    return inputs[rows], targets[rows]


@cache
def pairs(vocabulary: int = 256) -> Tensor:
    """Return the source text of ``random`` in byte pairs, merged until there are so many codes."""
    codes = _text().tolist()
    for new in range(128, vocabulary):
        counts: dict[tuple[int, int], int] = {}
        for pair in pairwise(codes):
            counts[pair] = counts.get(pair, 0) + 1
        first, second = max(counts, key=counts.__getitem__)
        merged, index = [], 0
        while index < len(codes):
            is_pair = codes[index] == first and codes[index + 1 : index + 2] == [second]
            merged.append(new if is_pair else codes[index])
            index += 1 + is_pair
        codes = merged
    return torch.tensor(codes)


def language(tokens: Callable[[], Tensor], held_out: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def batch(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        codes, length = tokens(), 64
        end = len(codes) - held_out
        starts = torch.arange(end, len(codes) - length - 1, length)[:, None]
        if generator is not None:
            starts = torch.randint(end - length - 1, (4, 1), generator=generator)
        window = codes[starts + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:].flatten()

    return batch


@cache
def prose() -> Tensor:
    """Return the help texts that come with Python, as character codes."""
    from pydoc_data.topics import topics

    return torch.tensor([min(ord(c), 127) for c in "".join(topics.values())])
