"""Read the gradient of the loss with respect to an output: class axis, and rows that count.

A loss of softmax probabilities does not change if all logits of a row are shifted alike, so its
gradient sums to zero over the classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safestep.capture.loss_graph import Use
from safestep.parallel.shards import whole

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
        is_changed: Whether the output was changed in place after the model returned it, so that
            `values` are not known.
        zeros: True where the gradient of a single class is zero, ``[*B, C]``; None if there is no
            such class in a row that counts.
        largest: The largest absolute gradient of each row, ``[*B]``, where `zeros` is given.
        labels: The class with the lowest gradient of each row, ``[*B]``; None without a class axis
            or of several gradients.
        pulls: Minus that gradient, ``[*B]``.
        use: How the loss uses the output, as the autograd graph shows; None where it was not read.
    """

    class_axis: int | None
    counted: Tensor
    rows: Tensor | None
    sample: Tensor
    values: Tensor | None = None
    is_changed: bool = False
    zeros: Tensor | None = None
    largest: Tensor | None = None
    labels: Tensor | None = None
    pulls: Tensor | None = None
    use: Use | None = None

    @classmethod
    def of(
        cls,
        gradient: Tensor,
        class_axis: int | None = None,
        output: Tensor | None = None,
        *,
        is_changed: bool = False,
        has_zeros: bool | None = None,
        use: Use | None = None,
    ) -> GradientEvidence:
        """Return what a gradient shows.

        Args:
            gradient: Gradient of the loss with respect to an output. Any shape.
            class_axis: The axis of the classes, if it is known already; else it is looked for.
            output: The output that the gradient belongs to. It is kept, since a re-run computes
                another one if another optimizer has stepped in between.
            is_changed: Whether the output was changed in place after the model returned it.
            has_zeros: Whether to keep where single classes have no gradient; None to find out.
            use: How the loss uses the output, if that is known.

        Returns:
            The class axis, the rows that count, and the largest gradients.
        """
        gradient, output = whole(gradient), whole(output)  # logits of `loss_parallel` are cut
        if class_axis is None:
            class_axis = zero_sum_axis(gradient)
        if class_axis is None:
            return cls(None, gradient.ne(0), None, gradient, output, is_changed, use=use)
        by_row = gradient.movedim(class_axis, -1)
        # No temporary of the gradient's size; aminmax along an axis is slow on a CPU.
        lowest, labels = by_row.min(dim=-1)
        pulls = -lowest
        largest = torch.maximum(pulls, by_row.amax(dim=-1))
        rows = largest.flatten().topk(min(_SAMPLED_ROWS, largest.numel())).indices
        sample = by_row.reshape(-1, by_row.shape[-1])[rows]  # also of a single row
        if output is not None:
            output = output.movedim(class_axis, -1).reshape(-1, by_row.shape[-1])[rows]
        # A mask of -inf between the output and its softmax leaves zeros in the largest rows too.
        if has_zeros is None:
            has_zeros = bool(sample.eq(0).any())
        counted = largest.ne(0)
        zeros, size = (by_row.eq(0), largest) if has_zeros else (None, None)
        return cls(
            class_axis, counted, rows, sample, output, is_changed, zeros, size, labels, pulls, use
        )

    @property
    def is_live(self) -> bool:
        """Whether any of the gradient is not zero."""
        return bool(self.counted.any())

    @property
    def sums_to_zero(self) -> bool:
        """Whether the gradients of the sampled rows sum to zero, roughly, over the classes.

        A gradient whose small elements are rounded to zero need not do so exactly.
        """
        return bool(self.sample.sum(-1).abs().sum() <= 0.1 * self.sample.abs().sum())

    def first(self, examples: int, of: int) -> GradientEvidence:
        """Return which rows of the first examples count; the largest gradients remain those of all.

        Args:
            examples: How many examples.
            of: Number of all examples.

        Raises:
            ValueError: If the first axis of the output is not that of the examples.
        """
        if not self.counted.ndim:  # a loss
            return self
        if len(self.counted) != of or self.class_axis == 0:
            raise ValueError(f"the output's first axis is not that of the {of} examples")
        zeros, largest = (
            None if each is None else each[:examples] for each in (self.zeros, self.largest)
        )
        return replace(
            self, counted=self.counted[:examples], zeros=zeros, largest=largest, labels=None,
            pulls=None,
        )  # fmt: skip

    def joined(self, other: GradientEvidence) -> GradientEvidence:
        """Return what the gradients of two backward passes through one output show together.

        Args:
            other: What the other gradient shows.

        Returns:
            The rows that count in either; the largest gradients of both, or the sum of both if
            neither has a class axis.
        """
        use = None if self.use is None or other.use is None else self.use.joined(other.use)
        one, two = (self, other) if self.class_axis is not None else (other, self)
        is_changed = one.is_changed or two.is_changed
        if one.class_axis is None:
            values = None if is_changed else one.values
            return GradientEvidence(
                None, one.counted | two.counted, None, one.sample + two.sample, values, is_changed,
                use=use,
            )  # fmt: skip
        if two.rows is None:
            counted = one.counted | two.counted.any(one.class_axis)
            return replace(
                one, counted=counted, zeros=None, largest=None, is_changed=is_changed,
                labels=None, pulls=None, use=use,
            )  # fmt: skip
        assert one.rows is not None
        has_values = one.values is not None and two.values is not None
        return GradientEvidence(
            one.class_axis, one.counted | two.counted, torch.cat((one.rows, two.rows)),
            torch.cat((one.sample, two.sample)),
            torch.cat((one.values, two.values)) if has_values else None,  # type: ignore[list-item]
            is_changed, *_common_zeros(one, two), use=use,
        )  # fmt: skip


def _common_zeros(
    one: GradientEvidence, two: GradientEvidence
) -> tuple[Tensor | None, Tensor | None]:
    """Return where both gradients are zero, and the larger one of each row."""
    zeros = [
        ~each.counted.unsqueeze(-1) if each.zeros is None else each.zeros for each in (one, two)
    ]
    largest = [each.largest for each in (one, two) if each.largest is not None]
    if not largest:
        return None, None
    return zeros[0] & zeros[1], largest[0] if len(largest) == 1 else torch.maximum(*largest)


def masked_classes(logits: Tensor, zeros: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the classes that a mask removed between the output and its softmax.

    Their gradient is zero, though a softmax would have left more than rounds to zero: at least
    largest * exp(logit - top) / C, where top is the largest logit that has a gradient.

    Args:
        logits: What enters the softmax but for the mask. Shape ``[*B, C]``.
        zeros: True where the gradient is zero. Shape ``[*B, C]``.
        largest: Largest absolute gradient of each row. Shape ``[*B]``.
        dtype: Type of the gradient.

    Returns:
        Shape ``[*B, C]``.

    Example:
        >>> zeros = torch.tensor([[False, True, False, True]])
        >>> logits = torch.tensor([[0.0, 1.0, 2.0, -200.0]])
        >>> masked_classes(logits, zeros, torch.tensor([0.5]), torch.float32)
        tensor([[False,  True, False, False]])
    """
    limits = torch.finfo(dtype)
    least = 8 * limits.tiny * limits.eps if dtype == torch.float16 else limits.tiny
    logits = logits.detach().double()
    top = logits.masked_fill(zeros, -math.inf).amax(-1, keepdim=True)
    log_size = largest.double().log().unsqueeze(-1) + logits - top - math.log(logits.shape[-1])
    return zeros & (log_size > math.log(least))


def is_masked_softmax(logits: Tensor, gradient: Tensor) -> bool:
    """Return whether zeros in a gradient come from a mask rather than from a margin.

    A margin spares the least likely classes; a mask spares some that are more likely than others.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        True if rows with three classes or more are so often enough.
    """
    zeros = gradient.eq(0)
    label = gradient.abs().argmax(-1, keepdim=True)
    others = (~zeros).scatter(-1, label, False)
    tells = (others.sum(-1) > 1) & zeros.any(-1)
    least = logits.masked_fill(~others, math.inf).amin(-1)
    spared = logits.masked_fill(~zeros, -math.inf).amax(-1)
    return bool(tells.any()) and bool((spared > least)[tells].double().mean() > 0.3)


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


def pulls_alike(logits: Tensor, gradient: Tensor) -> bool:
    """Return whether a loss pulls alike at classes whose logits differ, which no softmax does.

    A hinge pulls by the same amount at every class within its margin.

    Args:
        logits: Rows of logits. Shape ``[S, C]``.
        gradient: Gradient of the loss with respect to them. Shape ``[S, C]``.

    Returns:
        True if the gradients of all unlabelled classes that have one are the same in each row, and
        their logits are not.

    Example:
        >>> z = torch.tensor([[2.0, 1.5, 1.0, 1.2]], requires_grad=True)
        >>> loss = torch.nn.functional.multi_margin_loss(z, torch.tensor([0]))
        >>> pulls_alike(z.detach(), *torch.autograd.grad(loss, z))
        True
    """
    label = gradient.abs().argmax(-1, keepdim=True)
    others = gradient.ne(0).scatter(-1, label, False) & logits.isfinite()
    tells = others.sum(-1) > 1
    if not bool(tells.any()):
        return False
    ranges = [
        values.masked_fill(~others, -math.inf).amax(-1)
        - values.masked_fill(~others, math.inf).amin(-1)
        for values in (logits.detach().double(), gradient.double())
    ]
    # A softmax at temperature T differs by the share (range of logits) / T.
    size = gradient.double().masked_fill(~others, 0.0).abs().amax(-1)
    tolerance = _ZERO_SUM_TOLERANCE.get(gradient.dtype, _ZERO_SUM_TOLERANCE_HALF)
    return bool((ranges[1] <= tolerance * ranges[0] * size)[tells].all())


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


def first_rows(gradient: Tensor) -> Tensor:
    """Return a few rows of a gradient, which show whether it sums to zero over classes."""
    return gradient[:4] if gradient.ndim else gradient


def zero_sum_axis(gradient: Tensor) -> int | None:
    """Return the axis over which a gradient sums to zero, None if there is none."""
    # Classes are last, or second as in [B, C, H, W]. Other axes sum to zero for other reasons: the
    # batch axis of what enters a BatchNorm.
    axes = [
        axis
        for axis in dict.fromkeys((gradient.ndim - 1, 1))
        if 0 <= axis < gradient.ndim and gradient.shape[axis] > 1
    ]
    if not axes:
        return None
    tolerance = _ZERO_SUM_TOLERANCE.get(gradient.dtype, _ZERO_SUM_TOLERANCE_HALF)
    residuals = [gradient.sum(axis, dtype=torch.float64).abs().sum() for axis in axes]
    total, *sums = torch.stack([gradient.abs().sum(dtype=torch.float64), *residuals]).tolist()
    zeros = (axis for axis, rest in zip(axes, sums, strict=True) if rest <= tolerance * total)
    return next(zeros, None) if 0 < total < math.inf else None
