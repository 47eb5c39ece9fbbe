"""Norms over many tensors at once."""

import math
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from safestep._torch import foreach_norm
from safestep.parallel.placements import sharding_groups
from safestep.parallel.shards import local_parts

_HALVES = frozenset((torch.float16, torch.bfloat16))
_is_sparse, _dtype = attrgetter("is_sparse"), attrgetter("dtype")


@torch.no_grad()
def joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together, reduced in float32 or wider.

    Args:
        tensors: Tensors of any shapes and floating dtypes; of sparse ones the stored values count.

    Returns:
        A float64 scalar on the device of the first tensor, 0 if there are none. Not finite if any
        entry is not, or if the squares overflow.

    Example:
        >>> joint_norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)])
        tensor(5., dtype=torch.float64)
    """
    norms = each_norm(tensors)
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]).double())


def each_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of every tensor, reduced in float32 or wider.

    Call it under ``no_grad``: it does not switch gradients off itself, to save time at every step.

    Args:
        tensors: As for ``joint_norm``.

    Returns:
        A scalar for each, in their order.
    """
    dense = list(tensors)
    if any(map(_is_sparse, tensors)):
        dense = [tensor._values() if tensor.is_sparse else tensor for tensor in tensors]
    if _HALVES.isdisjoint(map(_dtype, dense)):
        return list(foreach_norm(dense)) if dense else []
    is_narrow = [tensor.dtype in _HALVES for tensor in dense]
    halves = list(compress(dense, is_narrow))
    wide = [tensor for tensor in dense if tensor.dtype not in _HALVES]
    narrow_norms = iter(foreach_norm(halves, 2, torch.float32))
    wide_norms = iter(foreach_norm(wide) if wide else ())
    return [next(narrow_norms if narrow else wide_norms) for narrow in is_narrow]


def norm_over_ranks(params: Sequence[Tensor], tensors: Sequence[Tensor]) -> float:
    """Return the 2-norm of tensors of which each rank holds the shards of its parameters.

    One small all-reduce for every way in which parameters are sharded; each rank must call it.

    Args:
        params: The parameters.
        tensors: This rank's part of a tensor for each parameter.

    Returns:
        The norm of the whole tensors, the same on every rank.
    """
    squares: dict[tuple[Any, ...], Tensor] = {}
    for param, norm in zip(params, each_norm(local_parts(tensors)), strict=True):
        groups = sharding_groups(param)
        squares[groups] = squares.get(groups, 0) + norm.double().square()
    total = 0.0
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
        total += float(square)
    return math.sqrt(total)
