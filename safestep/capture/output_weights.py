"""Weights and labels of the rows of an unseen loss, from its gradient at a model's output."""

from __future__ import annotations

import torch
from torch import Tensor

from safestep.capture.gradient import GradientEvidence
from safestep.radius.loss_change import RowLoss

# A row whose label has nearly all probability has a gradient that is mostly rounding.
_LEAST_MISS = 1e-3
_TOLERANCE, _TOLERANCE_HALF = 2e-3, 3e-2


def of_logits(logits: Tensor, evidence: GradientEvidence, scale: float = 1.0) -> RowLoss | str:
    """Return weights and labels where each row has one label, smoothed or not.

    The gradient of a row is then w (P - y), y = 1 - s + s / C for the label and s / C elsewhere.
    That all sampled rows have the same s confirms the form.

    Args:
        logits: What enters the softmax. Shape ``[*B, C]``.
        evidence: What the gradient of the loss shows at `scale` times the logits.
        scale: The temperature.

    Returns:
        Weights and labels, or why they are not known.
    """
    if evidence.rows is None:
        return f"the gradient at the output does not show the rows' labels. {_HOW_TO_TELL}"
    if evidence.labels is None or evidence.pulls is None:
        return "several backward passes went through one output"
    if evidence.labels.shape != logits.shape[:-1] or evidence.sample.shape[-1] != logits.shape[-1]:
        return "the output whose gradient is known has another shape than the logits"
    logits = logits.detach()
    sampled = logits.reshape(-1, logits.shape[-1])[evidence.rows]
    smoothing = _smoothing(sampled, evidence.sample, evidence.labels.flatten()[evidence.rows])
    if smoothing is None:
        return (
            "the gradient at the output is not that of one label in each row, and does not show "
            f"the rows' weights. {_HOW_TO_TELL}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = wide.gather(-1, evidence.labels.unsqueeze(-1)).squeeze(-1)
    miss = -torch.expm1(picked - wide.logsumexp(dim=-1))
    miss = miss - smoothing * (1 - 1 / logits.shape[-1])
    weight = _filled(evidence.pulls.to(miss) * scale / miss, miss)
    return RowLoss(weight, evidence.labels, smoothing)


def of_sigmoid_logits(logit: Tensor, gradient: Tensor, scale: float = 1.0) -> RowLoss | str:
    """Return weights and labels of sigmoid logits with labels 0 and 1.

    Args:
        logit: What enters the sigmoid. Shape ``[*B]``.
        gradient: The gradient of the loss at `scale` times it. Shape ``[*B]``.
        scale: The temperature.

    Returns:
        Weights and labels of the rows (0, logit), or why they are not known.
    """
    label = gradient < 0
    logit = logit.detach().to(torch.promote_types(logit.dtype, torch.float32))
    miss = torch.where(label, -logit, logit).sigmoid()
    weight = gradient.abs().to(miss) * scale / miss
    for group in (label, ~label):
        weight = torch.where(group, _filled(weight, miss.where(group, 0.0)), weight)
    return RowLoss(weight, label.long())


def of_log_probabilities(gradient: Tensor) -> RowLoss | str:
    """Return weights and labels from the gradient at log-probabilities, which is -w y.

    Args:
        gradient: Shape ``[*B, C]``.

    Returns:
        Weights and labels.
    """
    weight = -gradient.sum(dim=-1)
    return RowLoss(weight, -gradient / torch.where(weight == 0, 1.0, weight).unsqueeze(-1))


def _filled(weight: Tensor, miss: Tensor) -> Tensor:
    """Return the weights, that of the median row for those fitted too well to show theirs."""
    shows = (miss > _LEAST_MISS) & (weight > 0)
    middle = weight.where(shows, torch.nan).nanmedian()
    return torch.where(shows, weight, middle)


def _smoothing(logits: Tensor, gradient: Tensor, labels: Tensor) -> float | None:
    """Return the share of the labels that goes to all classes alike; None if the rows differ."""
    is_half = gradient.dtype in (torch.float16, torch.bfloat16)
    tolerance = _TOLERANCE_HALF if is_half else _TOLERANCE
    classes = logits.shape[-1]
    if classes == 2:
        return 0.0
    share, y = logits.double().softmax(dim=-1), gradient.double()
    is_other = torch.ones_like(y).scatter(-1, labels.unsqueeze(-1), 0.0) * (logits > -torch.inf)
    count = is_other.sum(dim=-1, keepdim=True)
    x_mean = (share * is_other).sum(dim=-1, keepdim=True) / count
    y_mean = (y * is_other).sum(dim=-1, keepdim=True) / count
    x, y = (share - x_mean) * is_other, (y - y_mean) * is_other
    square = x.square().sum(dim=-1, keepdim=True)
    slope = (x * y).sum(dim=-1, keepdim=True) / square
    rest = (y - slope * x).square().sum(dim=-1) / y.square().sum(dim=-1)
    smoothed = (classes * (x_mean - y_mean / slope)).squeeze(-1)
    tells = (square / count / x_mean.square()).squeeze(-1) > 1e-4
    tells &= gradient.ne(0).any(dim=-1)
    smoothed, rest = smoothed[tells], rest[tells].sqrt()
    if not len(smoothed):
        return None
    middle = smoothed.median()
    agrees = ((smoothed - middle).abs() < tolerance) & (rest < 5 * tolerance)
    if not agrees.double().mean() >= 0.9 or not -tolerance < middle < 1:
        return None
    return 0.0 if middle < tolerance else float(middle)


_HOW_TO_TELL = "Tell the guard the whole training step: guard.record(step, *args), before it runs"
