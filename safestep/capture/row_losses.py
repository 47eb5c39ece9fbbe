"""Weights and labels of the rows of a loss, from the arguments of the function that computed it.

Each reader is called like its torch function, with the gradient of the loss at the result first:
None where that is one number, so that all rows share it. It yields one RowLoss for each part that
the function's reader of logits yields, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from safestep.capture import fused_logits as tiles
from safestep.radius.loss_change import RowLoss

RowLossReader = Callable[..., Iterator[RowLoss | str]]
_OLD_REDUCTION = "the loss is called with `size_average` or `reduce`, which torch no longer names"


def of_cross_entropy(
    gradient: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: int = -100,
    reduce: object = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Iterator[RowLoss | str]:
    """Read cross_entropy and nll_loss."""
    if size_average is not None or reduce is not None:
        yield _OLD_REDUCTION
        return
    classes = input.shape[1 if input.ndim > 1 else 0]
    if target.is_floating_point() and input.ndim > 1:
        target = target.movedim(1, -1)
    yield _labelled(
        gradient, target, classes, weight, ignore_index, reduction, label_smoothing, input
    )


def _labelled(
    gradient: Tensor | None,
    target: Tensor,
    classes: int,
    weight: Tensor | None,
    ignore_index: int | None,
    reduction: str,
    smoothing: float,
    like: Tensor,
) -> RowLoss:
    """Return the rows of a cross-entropy, whose classes are last in a target of shares."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if target.is_floating_point():
        shares = target.to(dtype) * (1 - smoothing) + smoothing / classes
        shares = shares if weight is None else shares * weight
        rows = shares.sum(dim=-1)
        total = torch.tensor(float(rows.numel()))
        loss = RowLoss(rows, shares / _nonzero(rows).unsqueeze(-1))
    else:
        is_labelled = target != (-100 if ignore_index is None else ignore_index)
        label = target.clamp(0, classes - 1)
        own = torch.ones_like(label, dtype=dtype) if weight is None else weight[label].to(dtype)
        own = own * is_labelled
        total = own.sum()
        loss = RowLoss(own, label, smoothing)
        if weight is not None and smoothing:
            shares = torch.nn.functional.one_hot(label, classes).to(dtype) * (1 - smoothing)
            shares = (shares + smoothing / classes) * weight * is_labelled.unsqueeze(-1)
            rows = shares.sum(dim=-1)
            loss = RowLoss(rows, shares / _nonzero(rows).unsqueeze(-1))
    return RowLoss(_scaled(loss.weight, total, reduction, gradient), loss.labels, loss.smoothing)


def of_linear_cross_entropy(
    gradient: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    **_: object,
) -> Iterator[RowLoss | str]:
    """Read linear_cross_entropy, one entry for each tile of rows."""
    classes, *positions, features = linear_weight.shape
    rows = input.numel() // features
    is_shares = target.is_floating_point() and target.ndim > 1
    target = target.movedim(1, -1) if is_shares else target
    target = target.reshape(rows, *positions, *((classes,) if is_shares else ()))
    gradient = None if gradient is None else gradient.reshape(rows, *positions)
    loss = _labelled(
        gradient, target, classes, weight, ignore_index, reduction, label_smoothing, input
    )
    for part in tiles.row_slices(rows, linear_weight.numel() // features):
        yield RowLoss(loss.weight[part], loss.labels[part], loss.smoothing)


def of_chunked_logprob(
    gradient: Tensor | None, hidden: Tensor, weight: Tensor, bias: object, targets: Tensor,
    *_: object,
) -> Iterator[RowLoss | str]:  # fmt: skip
    """Read TRL's log-probabilities of targets."""
    for part in tiles.row_slices(len(hidden), len(weight)):
        yield UNWEIGHED if gradient is None else RowLoss(-gradient[part], targets[part])


def of_binary_cross_entropy_with_logits(
    gradient: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Iterator[RowLoss | str]:
    """Read binary_cross_entropy_with_logits: each element is a row (0, z)."""
    if size_average is not None or reduce is not None:
        yield _OLD_REDUCTION
        return
    target = target.to(torch.promote_types(input.dtype, torch.float32)).expand_as(input)
    positive = target if pos_weight is None else target * pos_weight
    shares = torch.stack((1 - target, positive), dim=-1)
    shares = shares if weight is None else shares * weight.expand_as(input).unsqueeze(-1)
    rows = shares.sum(dim=-1)
    total = torch.tensor(float(rows.numel()))
    yield RowLoss(_scaled(rows, total, reduction, gradient), shares / _nonzero(rows).unsqueeze(-1))


def of_kl_div(
    gradient: Tensor | None,
    input: Tensor,
    target: Tensor,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Iterator[RowLoss | str]:
    """Read kl_div: a cross-entropy but for a constant."""
    if size_average is not None or reduce is not None:
        yield _OLD_REDUCTION
        return
    shares = (target.exp() if log_target else target).expand_as(input)
    if gradient is not None and gradient.ndim:
        shares, gradient = shares * gradient, None
    total = torch.tensor(float(input.numel() if reduction == "mean" else len(input)))
    rows = shares.sum(dim=-1)
    reduction = "mean" if reduction == "batchmean" else reduction
    yield RowLoss(_scaled(rows, total, reduction, gradient), shares / _nonzero(rows).unsqueeze(-1))


def _scaled(rows: Tensor, total: Tensor, reduction: str, gradient: Tensor | None) -> Tensor:
    rows = rows / _nonzero(total.to(rows)) if reduction == "mean" else rows
    return (
        rows if gradient is None else rows * gradient.reshape(rows.shape if gradient.ndim else ())
    )


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values == 0, 1.0, values)


UNWEIGHED = "the weights of the rows in the loss are not known"
