"""Read the gradient of the loss with respect to an output: class axis, and rows that count.

A loss of softmax probabilities does not change if all logits of a row are shifted alike, so its
gradient sums to zero over the classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# |sum| / sum|.| of dL/dlogits over the classes: measured 1e-8 (float32), 7e-4 (bfloat16) for losses
# of softmax probabilities, .2 to .5 for MSE and binary cross-entropy.
_ZERO_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ZERO_SUM_TOLERANCE_HALF = 1e-2
# Rows with the largest gradients, to which a temperature is fitted.
_SAMPLED_ROWS = 32


@dataclass(frozen=True, slots=True)
class GradientEvidence:
    """What the gradient of the loss shows about an output.

    Attributes:
        class_axis: The axis over which the gradient sums to zero, None if there is none.
        counted: True where a row has any gradient, in the shape of the output without its class
            axis; if there is none, True where the gradient is not zero.
        rows: Indices of the rows, flattened, that have the largest gradients. Shape ``[S]``.
        sample: Their gradients, ``[S, C]``; the whole gradient if there is no class axis.
        values: The output in the places of `sample`, if it was given.
    """

    class_axis: int | None
    counted: Tensor
    rows: Tensor | None
    sample: Tensor
    values: Tensor | None = None

    @classmethod
    def of(
        cls, gradient: Tensor, class_axis: int | None = None, output: Tensor | None = None
    ) -> GradientEvidence:
        """Return what a gradient shows.

        Args:
            gradient: Gradient of the loss with respect to an output. Any shape.
            class_axis: The axis of the classes, if it is known already; else it is looked for.
            output: The output that the gradient belongs to. It is kept, since a re-run computes
                another one if another optimizer has stepped in between.

        Returns:
            The class axis, the rows that count, and the largest gradients.
        """
        if class_axis is None:
            class_axis = zero_sum_axis(gradient)
        if class_axis is None:
            return cls(None, gradient.ne(0), None, gradient, output)
        by_row = gradient.movedim(class_axis, -1)
        # No temporary of the gradient's size; aminmax along an axis is slow on a CPU.
        largest = torch.maximum(-by_row.amin(dim=-1), by_row.amax(dim=-1))
        rows = largest.flatten().topk(min(_SAMPLED_ROWS, largest.numel())).indices
        sample = by_row.flatten(0, -2)[rows]
        if output is not None:
            output = output.movedim(class_axis, -1).flatten(0, -2)[rows]
        return cls(class_axis, largest.ne(0), rows, sample, output)


def is_blind_to_scale(values: Tensor, gradient: Tensor) -> bool:
    """Return whether shifting and scaling a row leaves the loss alone: a LayerNorm follows.

    Args:
        values: Rows of an output. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        True if most rows' gradients have no component along the row. Not all: where a row varies
        little, the normalisation's ``eps`` or rounding leaves some.
    """
    values = values.detach().double()
    values = values - values.mean(-1, keepdim=True)
    product = values * gradient.double()
    tolerance = _ZERO_SUM_TOLERANCE.get(gradient.dtype, _ZERO_SUM_TOLERANCE_HALF)
    along = product.sum(-1).abs() / product.abs().sum(-1)  # NaN in rows without a gradient
    return bool(along.nanmedian() <= 10 * tolerance)


def spares_likely_classes(logits: Tensor, gradient: Tensor) -> bool:
    """Return whether a likely class has no gradient, which no softmax does.

    A margin loss does, and so does a loss of the difference of two logits.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        True if a row with a gradient has such a class.
    """
    likely = logits > logits.amax(-1, keepdim=True) - 4
    return bool((gradient.ne(0).any(-1, keepdim=True) & likely & gradient.eq(0)).any())


def lowers_labels(logits: Tensor, gradient: Tensor) -> bool:
    """Return whether the label of some row has a negative weight.

    The gradient of the other classes then falls with their probability.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of a loss with one label a row. Shape ``[S, C]``.

    Returns:
        True for policy gradients and for losses that push rejected answers away.
    """
    if logits.shape[-1] < 5:
        return False
    # One of the two largest gradients is the label's.
    others = gradient.abs().argsort(-1)[:, :-2]
    x = logits.detach().double().softmax(-1).gather(-1, others)
    y = gradient.double().gather(-1, others)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    is_clear = y.norm(dim=-1) > 1e-3 * gradient.abs().amax(-1)
    return bool((is_clear & ((x * y).sum(-1) < -0.5 * x.norm(dim=-1) * y.norm(dim=-1))).any())


def zero_sum_axis(gradient: Tensor) -> int | None:
    """Return the axis over which a gradient sums to zero, None if there is none."""
    # Classes are last, or second as in [B, C, H, W]. Other axes sum to zero for other reasons: the
    # batch axis of what enters a BatchNorm.
    tolerance = _ZERO_SUM_TOLERANCE.get(gradient.dtype, _ZERO_SUM_TOLERANCE_HALF)
    for axis in dict.fromkeys((gradient.ndim - 1, 1)):
        if not 0 <= axis < gradient.ndim or gradient.shape[axis] < 2:
            continue
        residual = gradient.sum(axis, dtype=torch.float64).abs().sum()
        total = gradient.abs().sum(dtype=torch.float64)
        if bool(residual <= tolerance * total) and bool(total > 0):
            return axis
    return None
