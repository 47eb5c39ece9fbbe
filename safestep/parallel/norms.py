"""Norms over many tensors at once."""

import math
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter

import torch
from torch import Tensor

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
        return list(torch._foreach_norm(dense)) if dense else []
    is_narrow = [tensor.dtype in _HALVES for tensor in dense]
    halves = list(compress(dense, is_narrow))
    wide = [tensor for tensor in dense if tensor.dtype not in _HALVES]
    narrow_norms = iter(torch._foreach_norm(halves, 2, torch.float32))
    wide_norms = iter(torch._foreach_norm(wide) if wide else ())
    return [next(narrow_norms if narrow else wide_norms) for narrow in is_narrow]


def joined(norms: Iterable[float]) -> float:
    """Return the 2-norm of norms that are already Python numbers.

    Args:
        norms: The norms.

    Returns:
        Their 2-norm, 0 of none, not finite if one is not.

    Example:
        >>> joined([3.0, 4.0])
        5.0
    """
    return math.hypot(*norms)
