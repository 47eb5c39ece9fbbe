"""Fit the temperature between an output and its softmax to the gradient of the loss.

If each row has one label, the gradient of every other class is proportional to its probability,
which shows the temperature that the output was divided by.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_SAMPLED_ELEMENTS = 4096
_SAMPLED_CLASSES = 512
# Largest root mean square error of log|gradient| in a fit that is accepted.
_FIT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_FIT_TOLERANCE_HALF = 3e-2
# A temperature this close to 1 is rounding.
_SAME_TEMPERATURE = 0.02
_TEMPERATURES = 2.0 ** torch.linspace(-6, 6, 97, dtype=torch.float64)


def label_temperature(logits: Tensor, gradient: Tensor) -> float | None:
    """Return T if the gradient is that of a loss of softmax(logits / T) with one label per row.

    If the loss is a function of the label's probability, the gradients of the other classes are
    proportional to their probabilities: log|gradient_k| = logits_k / T + a constant of the row.
    With smoothed labels they are an affine function of softmax(logits / T). Of two classes, only
    rows of equal weight together show T.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        The temperature, rounded to 1.0 where it is close; None if no temperature explains the
        gradient; NaN if the temperatures of the rows differ.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0, 0.5]], requires_grad=True)
        >>> loss = torch.nn.functional.cross_entropy(logits / 4, torch.tensor([1]))
        >>> label_temperature(logits.detach(), *torch.autograd.grad(loss, logits))
        4.0
    """
    tolerance = _FIT_TOLERANCE.get(gradient.dtype, _FIT_TOLERANCE_HALF)
    logits, gradient = _usable(logits, gradient)
    if len(logits) == 0:
        return None
    if logits.shape[-1] == 2:
        return binary_temperature(logits[:, 1] - logits[:, 0], gradient[:, 1], tolerance)
    slopes = _log_slopes(logits, gradient, tolerance)
    if slopes is None:
        return _affine_temperature(logits, gradient, tolerance)
    return _common(*slopes, tolerance)


def hard_label_temperature(logits: Tensor, gradient: Tensor) -> float | None:
    """Return what ``label_temperature`` does, in less time, for labels that are not smoothed.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        The temperature; None where the labels are smoothed too.
    """
    tolerance = _FIT_TOLERANCE.get(gradient.dtype, _FIT_TOLERANCE_HALF)
    logits, gradient = _usable(logits, gradient)
    if len(logits) == 0 or logits.shape[-1] == 2:
        return None
    slopes = _log_slopes(logits, gradient, tolerance)
    return None if slopes is None else _common(*slopes, tolerance)


def _usable(logits: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows with a finite gradient, and of these the classes with the largest ones."""
    logits, gradient = logits.detach().double().cpu(), gradient.detach().double().cpu()
    live = gradient.ne(0).any(-1) & (logits < math.inf).all(-1) & gradient.isfinite().all(-1)
    live &= (logits.isfinite() | gradient.eq(0)).all(-1)  # a masked class
    logits, gradient = logits[live], gradient[live]
    classes = gradient.abs().topk(min(_SAMPLED_CLASSES, logits.shape[-1])).indices
    if logits.shape[-1] == 2:
        return logits, gradient
    return logits.gather(-1, classes), gradient.gather(-1, classes)


def _common(slopes: Tensor, points: Tensor, tolerance: float) -> float | None:
    """Return the temperature that the slopes of most rows share; NaN if they differ."""
    if len(slopes) == 0:
        return None
    middle = slopes.median()
    is_common = (slopes / middle - 1).abs().quantile(0.9) < max(_SAME_TEMPERATURE, 10 * tolerance)
    if is_common and middle > 0:
        return _rounded(1 / float(middle))
    # Two points always lie on a line, whose slope then shows nothing.
    return math.nan if bool((points > 2).sum() > 1) else None


def binary_temperature(
    logit: Tensor, gradient: Tensor, tolerance: float | None = None, guess: float | None = None
) -> float | None:
    """Return T if the gradient is that of a binary cross-entropy of sigmoid(logit / T).

    With labels 0 and 1, |gradient| is a weight times sigmoid(logit / T) or sigmoid(-logit / T), by
    its sign. The weight may depend on the label and on the column.

    Args:
        logit: Sigmoid logits. Shape ``[N]`` or ``[N, ...]``.
        gradient: Gradient of the loss with respect to them, of the same shape.
        tolerance: Largest root mean square error of log|gradient|.
        guess: A temperature that is tried first.

    Returns:
        The temperature, rounded to 1.0 where it is close; None if none explains the gradient.
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
    # Try one weight per label, then one per label and column.
    for group in ((sign > 0).long(), 2 * column + (sign > 0)):
        temperature = _binary_fit(sign * logit, size, group, tolerance, guess)
        if temperature is not None:
            return temperature
    return None


def _binary_fit(
    logit: Tensor, size: Tensor, group: Tensor, tolerance: float, guess: float | None
) -> float | None:
    """Fit log|gradient| = log sigmoid(logit / T) + a constant of each group.

    Returns:
        What ``binary_temperature`` does.
    """
    if len(size) < 2 * len(group.unique()) + 2:
        return None

    def error(temperature: float) -> float:
        rest = size - torch.nn.functional.logsigmoid(logit / temperature)
        mean = group.bincount(rest) / group.bincount().clamp(min=1)
        return float((rest - mean[group]).square().mean().sqrt())

    if guess is not None and error(guess) < tolerance:
        return guess
    return _best_temperature(error, tolerance)


def _log_slopes(logits: Tensor, gradient: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Return the slope of log|gradient| over the unlabelled logits of each row, and their number.

    Returns:
        None if they are not on a line.
    """
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
    # A row of nearly equal logits shows no temperature.
    tells = (count.squeeze(-1) > 1) & (x.square().sum(-1) > 0.01)
    if (error[tells].sqrt() > tolerance).any():
        return None
    return slope.squeeze(-1)[tells], count.squeeze(-1)[tells]


def _affine_temperature(logits: Tensor, gradient: Tensor, tolerance: float) -> float | None:
    """Fit gradient = weight * softmax(logits / T) + constant over all but the labelled classes.

    The class with the largest gradient is labelled. With seven classes or more, the two that fit
    worst may be labelled too (a mixture of two smoothed labels).

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
        # A fit of the constant alone explains nothing.
        spread = _affine_rest(torch.zeros_like(x), y, keep).square().sum(-1)
        return float((rest / spread).sqrt().nan_to_num(1.0).quantile(0.9))

    temperature = _best_temperature(error, 10 * tolerance)
    # Measured in bfloat16: right at T = 1, up to 20 % off elsewhere.
    is_coarse = tolerance == _FIT_TOLERANCE_HALF and temperature not in {None, 1.0}
    return math.nan if is_coarse else temperature


def _affine_rest(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the residual of an affine fit of y to x in each row, 0 where the weight is 0."""
    count = weight.sum(-1, keepdim=True)
    x = (x - (x * weight).sum(-1, keepdim=True) / count) * weight
    y = (y - (y * weight).sum(-1, keepdim=True) / count) * weight
    square = x.square().sum(-1, keepdim=True)
    slope = (x * y).sum(-1, keepdim=True) / square.clamp(min=torch.finfo(x.dtype).tiny)
    return y - slope * x


def _best_temperature(error: Callable[[float], float], tolerance: float) -> float | None:
    """Return the temperature of least error; None if the error is large or the minimum is flat."""
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
