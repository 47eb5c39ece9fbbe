"""What dL/doutput tells about an output: does a softmax follow, at which temperature?

A loss of softmax probabilities is blind to a shift of the logits, so its gradient sums to zero over
the classes. If each row has one label, the gradient of every other class is proportional to its
probability, which gives away a temperature that was applied between the output and the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# |sum| / sum|.| of dL/dlogits over the classes: measured 1e-8 (float32), 7e-4 (bfloat16) for losses
# of softmax probabilities, .2 to .5 for MSE and binary cross-entropy.
_ZERO_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ZERO_SUM_TOLERANCE_HALF = 1e-2
# Rows with the largest gradients that a temperature is read from.
_SAMPLED_ROWS = 32
_SAMPLED_ELEMENTS = 4096
_SAMPLED_CLASSES = 512
# Root mean square of the error of log|gradient| in a fit that is believed.
_FIT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_FIT_TOLERANCE_HALF = 3e-2
# A temperature this close to 1 is rounding.
_SAME_TEMPERATURE = 0.02
_TEMPERATURES = 2.0 ** torch.linspace(-6, 6, 97, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class GradientEvidence:
    """What dL/doutput says about an output.

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
        """Inspect a gradient; a class axis that is already known is not looked for again.

        Args:
            gradient: Gradient of the loss with respect to an output. Any shape.
            class_axis: The axis, if it is known.
            output: The output that the gradient belongs to. A re-run may find other parameters, if
                another optimizer has stepped in between.

        Returns:
            The class axis, the rows that count and the gradients of some.
        """
        if class_axis is None:
            class_axis = _zero_sum_axis(gradient)
        if class_axis is None:
            return cls(None, gradient.ne(0), None, gradient, output)
        by_row = gradient.movedim(class_axis, -1)
        # Without a temporary of the gradient's size, and not by aminmax, which is slow on a CPU.
        largest = torch.maximum(-by_row.amin(dim=-1), by_row.amax(dim=-1))
        rows = largest.flatten().topk(min(_SAMPLED_ROWS, largest.numel())).indices
        sample = by_row.flatten(0, -2)[rows]
        if output is not None:
            output = output.movedim(class_axis, -1).flatten(0, -2)[rows]
        return cls(class_axis, largest.ne(0), rows, sample, output)


def label_temperature(logits: Tensor, gradient: Tensor) -> float | None:
    """Return T if the gradient is that of a loss of softmax(logits / T) with one label a row.

    For every loss that is a function of the label's probability, the gradients of the other classes
    are proportional to theirs: log|gradient_k| = logits_k / T + a number of the row's own. With
    smoothed labels they are an affine function of softmax(logits / T). For two classes the row
    must share its weight with others.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        The temperature, 1.0 where it is that up to rounding, None if no temperature explains the
        gradient, NaN if the rows have one each but differ.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0, 0.5]], requires_grad=True)
        >>> loss = torch.nn.functional.cross_entropy(logits / 4, torch.tensor([1]))
        >>> label_temperature(logits.detach(), *torch.autograd.grad(loss, logits))
        4.0
    """
    tolerance = _FIT_TOLERANCE.get(gradient.dtype, _FIT_TOLERANCE_HALF)
    logits, gradient = logits.detach().double().cpu(), gradient.detach().double().cpu()
    live = gradient.ne(0).any(-1) & (logits < math.inf).all(-1) & gradient.isfinite().all(-1)
    live &= (logits.isfinite() | gradient.eq(0)).all(-1)  # a class at -inf is none
    logits, gradient = logits[live], gradient[live]
    if len(logits) == 0:
        return None
    if logits.shape[-1] == 2:
        return binary_temperature(logits[:, 1] - logits[:, 0], gradient[:, 1], tolerance)
    classes = gradient.abs().topk(min(_SAMPLED_CLASSES, logits.shape[-1])).indices
    logits, gradient = logits.gather(-1, classes), gradient.gather(-1, classes)
    slopes = _log_slopes(logits, gradient, tolerance)
    if slopes is None:
        return _affine_temperature(logits, gradient, tolerance)
    if len(slopes) == 0:
        return None
    middle = slopes.median()
    is_common = (slopes / middle - 1).abs().quantile(0.9) < max(_SAME_TEMPERATURE, 10 * tolerance)
    if is_common and middle > 0:
        return _rounded(1 / float(middle))
    # Two other classes are always on a line: that the lines differ says nothing about labels.
    return math.nan if logits.shape[-1] > 3 else None


def is_blind_to_scale(values: Tensor, gradient: Tensor) -> bool:
    """Return whether the gradient is blind to shift and scale of each row: a LayerNorm follows.

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
    """Return whether a class that a softmax makes likely has no gradient at all: it is no softmax.

    A margin loss is like that, and a comparison of two of the logits.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        True if there is such a class in a row that has a gradient.
    """
    likely = logits > logits.amax(-1, keepdim=True) - 4
    return bool((gradient.ne(0).any(-1, keepdim=True) & likely & gradient.eq(0)).any())


def lowers_labels(logits: Tensor, gradient: Tensor) -> bool:
    """Return whether a row's label has a negative weight: the gradient falls with the probability.

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


def binary_temperature(
    logit: Tensor, gradient: Tensor, tolerance: float | None = None
) -> float | None:
    """Return T if the gradient is that of a binary cross-entropy of sigmoid(logit / T).

    With labels 0 and 1, |gradient| is a weight times sigmoid(logit / T) or sigmoid(-logit / T), by
    its sign. The weight may depend on the label and on the column.

    Args:
        logit: Sigmoid logits. Shape ``[N]`` or ``[N, ...]``.
        gradient: Gradient of the loss with respect to them, of the same shape.
        tolerance: Largest root mean square error of log|gradient|.

    Returns:
        The temperature, 1.0 where it is that up to rounding, None if none explains the gradient.
    """
    tolerance = tolerance or _FIT_TOLERANCE.get(gradient.dtype, _FIT_TOLERANCE_HALF)
    rows = max(1, _SAMPLED_ELEMENTS * len(logit) // max(1, logit.numel()))
    logit, gradient = (
        each.detach()[:rows].flatten(1).double().cpu() if each.ndim > 1
        else each.detach()[:rows].unsqueeze(-1).double().cpu()
        for each in (logit, gradient)
    )  # fmt: skip
    sign = gradient.sign()
    usable = sign.ne(0) & logit.isfinite() & gradient.isfinite()
    column = torch.arange(logit.shape[1]).expand_as(logit)[usable]
    logit, sign, size = logit[usable], sign[usable], gradient[usable].abs().log()
    # One weight for each label, and if that does not fit, one for each label and column.
    for group in ((sign > 0).long(), 2 * column + (sign > 0)):
        temperature = _binary_fit(sign * logit, size, group, tolerance)
        if temperature is not None:
            return temperature
    return None


def _binary_fit(logit: Tensor, size: Tensor, group: Tensor, tolerance: float) -> float | None:
    """Fit log|gradient| = log sigmoid(logit / T) + a number of each group's own.

    Returns:
        What ``binary_temperature`` does.
    """
    if len(size) < 2 * len(group.unique()) + 2:
        return None

    def error(temperature: float) -> float:
        rest = size - torch.nn.functional.logsigmoid(logit / temperature)
        mean = group.bincount(rest) / group.bincount().clamp(min=1)
        return float((rest - mean[group]).square().mean().sqrt())

    return _best_temperature(error, tolerance)


def _log_slopes(logits: Tensor, gradient: Tensor, tolerance: float) -> Tensor | None:
    """Return d log|gradient| / d logit of each row's other classes; None if not a line."""
    label = gradient.abs().argmax(-1, keepdim=True)
    opposite = -gradient * gradient.gather(-1, label).sign()
    is_other = torch.ones_like(gradient, dtype=torch.bool).scatter(-1, label, False)
    noise = tolerance * gradient.abs().amax(-1, keepdim=True)
    if (is_other & (opposite < -noise)).any():
        return None
    weight = (is_other & (opposite > 0)).double()
    count = weight.sum(-1, keepdim=True)
    x = torch.where(weight > 0, logits, 0.0)
    y = torch.where(weight > 0, opposite.clamp(min=torch.finfo(torch.float64).tiny).log(), 0.0)
    x = (x - x.sum(-1, keepdim=True) / count) * weight
    y = (y - y.sum(-1, keepdim=True) / count) * weight
    slope = (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
    error = ((y - slope * x) * weight).square().sum(-1) / count.squeeze(-1)
    # Where the other logits are nearly equal, the row says nothing about the temperature.
    tells = (count.squeeze(-1) > 1) & (x.square().sum(-1) > 0.01)
    if (error[tells].sqrt() > tolerance).any():
        return None
    return slope.squeeze(-1)[tells]


def _affine_temperature(logits: Tensor, gradient: Tensor, tolerance: float) -> float | None:
    """Fit gradient = weight * softmax(logits / T) + constant over all but the labelled classes.

    The class with the largest gradient is labelled; of seven or more, so may be the two that fit
    worst (a mixture of two labels, both smoothed).

    Returns:
        What ``label_temperature`` does.
    """
    dropped = 2 if logits.shape[-1] >= 7 else 0
    others = gradient.abs().argsort(-1)[:, :-1]
    if others.shape[-1] < 4:
        return None
    z, y = logits.gather(-1, others), gradient.gather(-1, others)

    def error(temperature: float) -> float:
        x = (z / temperature).softmax(-1)
        keep = torch.ones_like(x)
        for _ in range(dropped):
            rest = _affine_rest(x, y, keep)
            keep.scatter_(-1, rest.abs().argmax(-1, keepdim=True), 0.0)
        rest = _affine_rest(x, y, keep).square().sum(-1)
        # The constant part of the gradient is not explained by anything.
        spread = _affine_rest(torch.zeros_like(x), y, keep).square().sum(-1)
        return float((rest / spread).sqrt().nan_to_num(1.0).quantile(0.9))

    temperature = _best_temperature(error, 10 * tolerance)
    # Measured in bfloat16: right at T = 1, up to 20 % off elsewhere.
    is_coarse = tolerance == _FIT_TOLERANCE_HALF and temperature not in {None, 1.0}
    return math.nan if is_coarse else temperature


def _affine_rest(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return what an affine function of x leaves of y in each row, 0 where the weight is."""
    count = weight.sum(-1, keepdim=True)
    x = (x - (x * weight).sum(-1, keepdim=True) / count) * weight
    y = (y - (y * weight).sum(-1, keepdim=True) / count) * weight
    square = x.square().sum(-1, keepdim=True)
    slope = (x * y).sum(-1, keepdim=True) / square.clamp(min=torch.finfo(x.dtype).tiny)
    return y - slope * x


def _best_temperature(error: Callable[[float], float], tolerance: float) -> float | None:
    """Return the temperature of least error, None if it explains little or others do as well."""
    best = float(min(_TEMPERATURES, key=lambda t: error(float(t))))
    ratio = 2.0 ** (1 / 8)
    for _ in range(40):
        best = min((best, best * ratio, best / ratio), key=error)
        ratio **= 0.75
    least = error(best)
    rivals = min(error(1.3 * best), error(best / 1.3))
    return _rounded(best) if least < tolerance and least < rivals / 5 else None


def _rounded(temperature: float) -> float:
    if abs(temperature - 1) < _SAME_TEMPERATURE:
        return 1.0
    return float(f"{temperature:.3g}")


def _zero_sum_axis(gradient: Tensor) -> int | None:
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
