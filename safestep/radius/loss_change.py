"""Predict the change of a loss along an update, for linearised logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safestep.radius.divergence import divergence_and_mean


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Weights and labels of the rows of a loss, sum_i w_i (logsumexp(z_i) - <y_i, z_i>).

    Attributes:
        weight: Weights w of the rows, up to a factor that all rows of a step share. Shape ``[*B]``.
        labels: Class indices, ``[*B]``; or shares of the classes, ``[*B, C]``, that sum to 1.
        smoothing: Share of a class index that goes to all classes alike.
    """

    weight: Tensor
    labels: Tensor
    smoothing: float = 0.0

    def label_tangent(self, tangent: Tensor) -> Tensor:
        """Return <y, a> of each row.

        Args:
            tangent: Tangent of the logits. Shape ``[*B, C]``.

        Returns:
            Shape ``[*B]``.
        """
        if self.labels.is_floating_point():
            return (self.labels * tangent).sum(dim=-1)
        index = self.labels.clamp(0, tangent.shape[-1] - 1).unsqueeze(-1)
        picked = tangent.gather(-1, index).squeeze(-1)
        if not self.smoothing:
            return picked
        return picked + self.smoothing * (tangent.mean(dim=-1) - picked)


class LossChange(NamedTuple):
    """What linearised logits predict of the mean loss of a row, in nats.

    With labels that sum to 1 the loss changes by `slope` + `divergence`, exactly.

    Attributes:
        divergence: KL divergence of the predictions from those after the update, the mean over
            the rows with their weights in the loss; with equal weights where these are not known.
        slope: Derivative of the loss along the update. NaN where the weights are not known.
        weight: Sum of the weights, by which both were divided.
        reason: Why the slope is NaN, else None.
    """

    divergence: float = math.nan
    slope: float = math.nan
    weight: float = math.nan
    reason: str | None = None


NO_CHANGE = LossChange()


class LossChangeSum:
    """Sum the change of a loss over sets of rows, with one read from the device at the end."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._reason: str | None = None

    def add(
        self, logits: Tensor, tangent: Tensor, mask: Tensor | None, loss: RowLoss | str
    ) -> None:
        """Add some rows.

        Args:
            logits: Numbers that enter the softmax. Shape ``[*B, C]``.
            tangent: Their tangent along the whole update. Shape ``[*B, C]``.
            mask: True where a row counts, None if all do. Shape ``[*B]``.
            loss: Weights and labels of the rows, or why they are not known.
        """
        divergence, mean = divergence_and_mean(logits, tangent, mask)
        counted = torch.ones_like(divergence) if mask is None else mask.to(divergence)
        if isinstance(loss, str):
            self._reason = self._reason or loss
            weight = slope = torch.full_like(divergence, math.nan)
        else:
            weight = loss.weight.to(divergence) * counted
            slope = mean - loss.label_tangent(tangent.to(mean.dtype)).to(mean)
        is_counted = weight != 0  # what does not count may be infinite
        slope = torch.where(is_counted, weight * slope, 0.0)
        terms = (divergence, counted, weight * divergence, slope, weight, weight < 0)
        self._sums.append(torch.stack([term.sum(dtype=torch.float64) for term in terms]))

    @property
    def total(self) -> Tensor:
        """Return the sums, to be read together with other numbers of the device.

        Returns:
            A float64 tensor of six numbers for `of`.
        """
        return torch.stack([each.to(self._sums[0].device) for each in self._sums]).sum(dim=0)

    def of(self, total: list[float]) -> LossChange:
        """Return the change of the mean loss.

        Args:
            total: What `total` returned, as numbers.

        Returns:
            The change.
        """
        divergence, count, weighted, slope, weight, negative = total
        reason = self._reason
        if reason is None and (negative or not weight > 0):
            reason = "some rows have a negative weight in the loss, or none has a weight"
        if reason is not None:
            mean = divergence / count if count else math.nan
            return LossChange(mean, weight=count, reason=reason)
        return LossChange(weighted / weight, slope / weight, weight)


def mean_change(mine: LossChange, rows: Tensor) -> LossChange:
    """Return the change of the mean loss of the rows of all workers.

    Args:
        mine: That of this worker's rows, for its reason.
        rows: Divergence, slope and weight of each worker. Shape ``[N, 3]``.

    Returns:
        The change; with equal weights of the workers where those of some rows are not known.
    """
    divergence, slope, weight = rows.unbind(dim=1)
    if bool(slope.isnan().any()):
        reason = mine.reason or "of another rank"
        return LossChange(float(divergence.mean()), weight=float(weight.sum()), reason=reason)
    total = weight.sum()
    divergence, slope = ((each * weight).sum() / total for each in (divergence, slope))
    return LossChange(float(divergence), float(slope), float(total))
