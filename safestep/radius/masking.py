"""Classes that a softmax gives no weight, as attention masks and forbidden actions do.

One rule for all: a class is absent where its logit is -inf or 1000 below the largest of its row;
its tangent then does not widen the row's range.
"""

import math

import torch
from torch import Tensor

# In logits below the row's largest: exp(-1000) is 0 in every dtype. Masks are -inf, -1e9, -1e4.
_ABSENCE = 1000.0


def absent_classes(logits: Tensor) -> Tensor | None:
    """Return True for the classes that have no weight in their row, None if all have some.

    Args:
        logits: Shape ``[*B, C]``.

    Returns:
        The classes, ``[*B, C]``.

    Example:
        >>> absent_classes(torch.tensor([[0.0, 2.0, -1e9]]))
        tensor([[False, False,  True]])
    """
    if not bool(logits.amin() < -_ABSENCE):  # one pass without a temporary, where nothing is masked
        return None
    depth = logits.amax(dim=-1, keepdim=True).float() - logits
    return (depth > _ABSENCE) | (logits == -math.inf)


def stand_in(logit_tangent: Tensor, exists: Tensor) -> Tensor:
    """Return for each row the tangent of a class that exists. Shape ``[*B, 1]``."""
    return logit_tangent.gather(-1, exists.byte().argmax(dim=-1, keepdim=True))


def filled_in(logit_tangent: Tensor, exists: Tensor) -> Tensor:
    """Return tangents where one class that exists stands in for those that do not."""
    return torch.where(exists, logit_tangent, stand_in(logit_tangent, exists))


def without_absent(logits: Tensor, logit_tangent: Tensor) -> Tensor:
    """Return the tangent with absent classes moved to the range of the others, nearly.

    A class M logits below the others first counts in F(t) where |t| times its distance from the
    range of the other tangents reaches M. 2 pi / M of that distance is left: no zero of F is nearer
    than pi / (spread of what is returned), up to terms of size exp(-M / 2).

    Args:
        logits: Shape ``[*B, C]``.
        logit_tangent: Shape ``[*B, C]``.

    Returns:
        A tangent of the same shape, the one given where no class is absent; 0 in rows where all
        are.

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
    # The tangent of a logit -inf may be anything, NaN in a difference.
    near = torch.where(logits == -math.inf, lowest, near)
    return torch.where(absent, near.to(logit_tangent), logit_tangent)
