"""Tensors inside torch.func.vmap, where a function sees one example of many."""

from __future__ import annotations

from torch import Tensor

from safestep._torch import get_unwrapped, is_batched, maybe_get_bdim


def held(tensor: Tensor) -> Tensor:
    """Return the tensor that holds all examples, with its autograd graph and tangent."""
    while is_batched(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def all_examples(tensor: Tensor) -> Tensor:
    """Return the tensor of all examples, batch axes first, that of the outermost vmap leading.

    Args:
        tensor: Any tensor, inside a vmap or not.

    Returns:
        The tensor of all examples; `tensor` itself outside a vmap.
    """
    axes = []
    while is_batched(tensor):
        axes.append(maybe_get_bdim(tensor))
        tensor = get_unwrapped(tensor)
    # An axis index does not count the axes of outer vmaps, which are already in front.
    for place, axis in enumerate(reversed(axes)):
        tensor = tensor.movedim(axis + place, place)
    return tensor
