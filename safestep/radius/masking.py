"""Classes that a softmax gives no weight, such as masked keys and forbidden actions.

One rule for all: a class is absent if its logit is -inf or more than 1000 below the largest of its
row. The tangent of an absent class does not widen the range of its row.
"""

import math

import torch
from torch import Tensor

# In logits below the row's largest: exp(-1000) is 0 in every dtype. Masks are -inf, -1e9, -1e4.
_ABSENCE = 1000.0


def absent_classes(logits: Tensor) -> Tensor | None:
    """Return a mask of the classes without weight in their row, None if there are none.

    Args:
        logits: Shape ``[*B, C]``.

    Returns:
        The mask, bool, ``[*B, C]``.

    Example:
        >>> absent_classes(torch.tensor([[0.0, 2.0, -1e9]]))
        tensor([[False, False,  True]])
    """
    if not bool(logits.amin() < -_ABSENCE):  # common case: one pass, no temporary
        return None
    depth = logits.amax(dim=-1, keepdim=True).float() - logits
    return (depth > _ABSENCE) | (logits == -math.inf)


def stand_in(logit_tangent: Tensor, exists: Tensor) -> Tensor:
    """Return for each row the tangent of a class that exists. Shape ``[*B, 1]``."""
    return logit_tangent.gather(-1, exists.byte().argmax(dim=-1, keepdim=True))


def filled_in(logit_tangent: Tensor, exists: Tensor) -> Tensor:
    """Return the tangent with absent classes replaced by a class of the row that exists."""
    return torch.where(exists, logit_tangent, stand_in(logit_tangent, exists))


def without_absent(logits: Tensor, logit_tangent: Tensor) -> Tensor:
    """Return the tangent with absent classes moved nearly into the range of the others.

    A class M logits below the others matters in F(t) only once |t| times its distance from the
    range of the other tangents reaches M. The result keeps 2 pi / M of that distance, so no zero of
    F is nearer than pi / (spread of the result), up to terms of size exp(-M / 2).

    Args:
        logits: Shape ``[*B, C]``.
        logit_tangent: Shape ``[*B, C]``.

    Returns:
        A tangent of the same shape, the given one if no class is absent; 0 in rows whose classes
        are all absent.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, -torch.inf]])
        >>> without_absent(logits, torch.tensor([[5.0, 6.0, 0.0]]))
        tensor([[5., 6., 5.]])
    """
    absent = absent_classes(logits)
    if absent is None:
        return logit_tangent
    is_empty = absent.all(dim=-1, keepdim=True)
    lowest = logit_tangent.masked_fill(absent, math.inf).amin(dim=-1, keepdim=True)
    highest = logit_tangent.masked_fill(absent, -math.inf).amax(dim=-1, keepdim=True)
    lowest, highest = lowest.masked_fill(is_empty, 0), highest.masked_fill(is_empty, 0)
    depth = logits.amax(dim=-1, keepdim=True).float() - logits
    near = torch.clamp(logit_tangent, lowest, highest)
    near = near + (logit_tangent - near) * (2 * math.pi / depth)
    # The tangent of a logit -inf is arbitrary; a finite difference makes it NaN.
    near = torch.where(logits == -math.inf, lowest, near)
    return torch.where(absent, near.to(logit_tangent), logit_tangent)
