"""Tensors inside of torch.func.vmap, which shows a function one example of many."""

from __future__ import annotations

from torch import Tensor

from safestep._torch import get_unwrapped, is_batchedtensor, maybe_get_bdim


def is_batched(tensor: Tensor) -> bool:
    """Return whether the tensor stands for many, as inside of ``torch.func.vmap``."""
    return is_batchedtensor(tensor)


def held(tensor: Tensor) -> Tensor:
    """Return the tensor that holds all examples, with autograd graph and tangent as it has them."""
    while is_batched(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def all_examples(tensor: Tensor) -> Tensor:
    """Return the tensor that holds all examples, along its first axes, the outermost vmap's first.

    Args:
        tensor: Any tensor, of an example or not.

    Returns:
        The tensor itself where it is not of an example.
    """
    axes = []
    while is_batched(tensor):
        axes.append(maybe_get_bdim(tensor))
        tensor = get_unwrapped(tensor)
    # An axis is counted without those of the examples around it, which are in front by then.
    for place, axis in enumerate(reversed(axes)):
        tensor = tensor.movedim(axis + place, place)
    return tensor
