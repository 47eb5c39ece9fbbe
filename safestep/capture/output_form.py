"""Infer, from its gradient, how a model output enters the softmax of an unseen loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from safestep.capture import output_weights
from safestep.capture.gradient import (
    GradientEvidence,
    is_blind_to_scale,
    is_masked_softmax,
    lowers_labels,
    masked_classes,
    pulls_alike,
    spares_likely_classes,
)
from safestep.capture.loss_graph import Use
from safestep.capture.losses import binary_rows
from safestep.capture.temperature import (
    binary_temperature,
    hard_label_temperature,
    label_temperature,
)
from safestep.radius.loss_change import RowLoss

Kind = Literal[
    "logits",
    "log-probabilities",
    "probabilities",
    "sigmoid logits",
    "sigmoid probabilities",
]
# Tolerance of |logsumexp| or |sum - 1| over the classes, in units of the dtype's rounding.
_ROUNDINGS = 64


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How an output enters a softmax.

    Attributes:
        kind: What its values are.
        class_axis: The axis of the classes, None for sigmoids.
        temperature: Divisor of the values before they enter the softmax.
        is_checked: Whether the gradient confirms the temperature.
        lowers_labels: Whether some rows are pushed away from their label, as by a negative weight.
        use: How the loss uses the output; None if the gradient alone shows the form.
    """

    kind: Kind
    class_axis: int | None = None
    temperature: float = 1.0
    is_checked: bool = True
    lowers_labels: bool = False
    use: Use | None = None

    @property
    def is_of_values(self) -> bool:
        """Whether the values alone show the kind: that they are normalised."""
        return self.kind in {"log-probabilities", "probabilities"}

    @property
    def is_evident(self) -> bool:
        """Whether this output must have entered a loss and not a later part of the model."""
        return self.is_checked and "probabilities" not in self.kind.split()

    def refreshed(self, output: Tensor, evidence: GradientEvidence) -> OutputForm:
        """Return the form with the temperature inferred from a later gradient, if there is one.

        Args:
            output: The tensor of the output.
            evidence: What the gradient of another step showed about it.

        Returns:
            The form; its temperature is NaN if it cannot be inferred.
        """
        temperature = None
        if self.use is not None:
            return self
        if self.kind == "logits" and self.is_checked and evidence.class_axis is not None:
            temperature = hard_label_temperature(_sampled(output, evidence), evidence.sample)
        elif self.kind == "sigmoid logits" and evidence.class_axis is None:
            values = output if evidence.values is None else evidence.values
            temperature = binary_temperature(values, evidence.sample, guess=self.temperature)
        if temperature is None or temperature == self.temperature:
            return self
        return replace(self, temperature=temperature)

    def is_stale(self, evidence: GradientEvidence) -> bool:
        """Return whether the evidence shows that the loss has changed."""
        if self.is_settled:
            return self.kind == "logits" and evidence.class_axis is None
        ways = [None if use is None else use.ways for use in (self.use, evidence.use)]
        return ways[0] != ways[1]

    @property
    def is_settled(self) -> bool:
        """Whether the gradient alone shows the form."""
        return self.is_checked and self.use is None

    def describe(self, name: str) -> str:
        """Return the name of the logits in words for the user.

        Args:
            name: Name of the output.

        Returns:
            For instance ``"output / 2"`` if a temperature was found.
        """
        name = name if self.kind == "logits" else f"{name} ({self.kind})"
        return name if self.temperature == 1.0 else f"{name} / {self.temperature:g}"

    def read(self, output: Tensor, evidence: GradientEvidence) -> tuple[Tensor, Tensor]:
        """Return the logits, ``[*B, C]``, and the rows that count, ``[*B]``.

        Args:
            output: The tensor of the output.
            evidence: What the gradient showed about it.

        Returns:
            Logits whose softmax is the one in the loss, and the mask.
        """
        if self.class_axis is None:
            is_logit = self.kind == "sigmoid logits"
            logit = output / self.temperature if is_logit else output.logit()
            return binary_rows(logit), evidence.counted
        counted = evidence.counted
        if evidence.class_axis is None:
            counted = counted.any(self.class_axis)
        logits = output.movedim(self.class_axis, -1)
        if self.kind == "probabilities":
            logits = logits.log()
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        if self.kind == "logits" and evidence.zeros is not None and evidence.largest is not None:
            dtype = evidence.sample.dtype
            logits = _without_masked(logits, evidence.zeros, evidence.largest, dtype)
        return logits, _with_fitted(counted, logits)

    def row_loss(self, logits: Tensor, evidence: GradientEvidence) -> RowLoss | str:
        """Return weights and labels of the rows in the loss.

        Args:
            logits: What `read` returned.
            evidence: What the gradient showed about the output.

        Returns:
            Weights and labels, or why they are not known.
        """
        gradient, scale = evidence.sample, self.temperature
        if self.kind == "logits" and not self.lowers_labels:
            return output_weights.of_logits(logits, evidence, scale)
        if self.kind == "log-probabilities" and self.class_axis is not None:
            return output_weights.of_log_probabilities(gradient.movedim(self.class_axis, -1))
        if self.kind == "sigmoid logits":
            return output_weights.of_sigmoid_logits(logits[..., 1], gradient, scale)
        if self.kind == "sigmoid probabilities":
            share = logits[..., 1].detach().sigmoid()
            gradient = gradient * share * (1 - share)
            return output_weights.of_sigmoid_logits(logits[..., 1], gradient)
        return "the gradient at the output does not show the rows' weights in the loss"


def _without_masked(logits: Tensor, zeros: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    masked = masked_classes(logits, zeros, largest, dtype)
    return logits.masked_fill(masked, -math.inf) if bool(masked.any()) else logits


def _with_fitted(counted: Tensor, logits: Tensor) -> Tensor:
    """Return the mask plus the rows whose gradient underflows because they are fitted perfectly."""
    if bool(counted.all()):
        return counted
    first, second = logits.detach()[~counted].float().topk(2).values.unbind(-1)
    limits = torch.finfo(logits.dtype)
    # dL/dlogits is about exp(-margin). An ignored row with such a margin is counted too.
    underflow = -math.log(limits.tiny * limits.eps)
    counted = counted.clone()
    counted[~counted] = first - second > underflow - math.log(counted.numel())
    return counted


def examine(output: Tensor, evidence: GradientEvidence) -> OutputForm | None:
    """Decide how an output enters a softmax, from its values and its gradient.

    Args:
        output: A tensor of a model's output.
        evidence: What the gradient of the loss showed about it.

    Returns:
        The form, with temperature NaN if it cannot be inferred; None if the output is not known to
        enter a softmax.
    """
    if not bool(evidence.sample.isfinite().all()):
        return None
    form, use = _by_gradient(output, evidence), evidence.use
    if use is None or evidence.is_changed:
        return form
    if form is not None and math.isnan(form.temperature) and use.is_harmless:
        return None  # a loss that sums to zero as a softmax does, and holds none
    if form is not None and form.is_checked:
        is_inner = form.is_of_values and bool(use.changes or use.has_sigmoid)
        return None if is_inner else form  # the loss is not a function of these probabilities alone
    return _by_graph(form, use, tuple(output.shape), evidence.class_axis)


def _by_graph(
    form: OutputForm | None, use: Use, shape: tuple[int, ...], zero_sum_axis: int | None
) -> OutputForm | None:
    """Return the form that the graph of the loss shows, where the gradient leaves it open."""
    form = None if form is None else replace(form, use=use)
    if use.is_split or use.is_shifted:
        return form
    if use.softmaxes and not use.has_sigmoid:
        axis = use.class_axis(shape, zero_sum_axis)
        if axis is None or use.changes:  # further softmaxes, of unknown logits
            return form
        return OutputForm("logits", axis, use=use)
    if use.changes:
        return None if form is None else replace(form, temperature=math.nan)
    if use.has_sigmoid and zero_sum_axis is None:
        return OutputForm("sigmoid logits", use=use)
    return form if use.hidden else None


def _by_gradient(output: Tensor, evidence: GradientEvidence) -> OutputForm | None:
    axis = evidence.class_axis
    if axis is None:
        output = output if evidence.values is None else evidence.values
        return _normalised(output) or _sigmoid(output, evidence.sample)
    sample, rows = evidence.sample, _sampled(output, evidence)
    if pulls_alike(rows, sample):
        return None
    is_spared = spares_likely_classes(rows, sample) and not is_masked_softmax(rows, sample)
    rows = _without_masked(rows, sample.eq(0), sample.abs().amax(-1), sample.dtype)
    temperature = label_temperature(rows, sample)
    if temperature is not None:
        is_lowered = lowers_labels(rows / temperature, sample)
        return OutputForm("logits", axis, temperature, lowers_labels=is_lowered)
    if is_spared or is_blind_to_scale(rows, sample):
        return None
    return OutputForm("logits", axis, is_checked=False)


def _sampled(output: Tensor, evidence: GradientEvidence) -> Tensor:
    """Return the output rows whose gradients are in the sample, ``[S, C]``."""
    if evidence.values is not None:
        return evidence.values
    assert evidence.class_axis is not None
    by_row = output.movedim(evidence.class_axis, -1)
    return by_row.reshape(-1, by_row.shape[-1])[evidence.rows]


def _normalised(output: Tensor) -> OutputForm | None:
    for axis in dict.fromkeys((output.ndim - 1, 1)):
        if not 0 <= axis < output.ndim or output.shape[axis] < 2:
            continue
        if _is_small(output.double().logsumexp(axis), output):
            return OutputForm("log-probabilities", axis)
        if bool((output >= 0).all()) and _is_small(output.double().sum(axis) - 1, output):
            return OutputForm("probabilities", axis)
    return None


def _sigmoid(output: Tensor, gradient: Tensor) -> OutputForm | None:
    temperature = binary_temperature(output, gradient)
    if temperature is not None:
        return OutputForm("sigmoid logits", temperature=temperature)
    if bool((output > 0).all() & (output < 1).all()):
        # dp/dlogit = p (1 - p) turns the gradient into that of the logit.
        gradient = gradient.double() * (output * (1 - output))
        if binary_temperature(output.logit(), gradient, 1e-3) == 1.0:
            return OutputForm("sigmoid probabilities")
    return None


def _is_small(residual: Tensor, output: Tensor) -> bool:
    rounding = _ROUNDINGS * torch.finfo(output.dtype).eps
    return bool((residual.abs() < rounding).all())
