"""Predict the change of a loss along an update, for linearised logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one [rows, classes] work array: 1 MiB in float64 stays in a processor's cache.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_DEVICE = 1 << 17, 1 << 22


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

    def excess(self, share: float, floor: float) -> float:
        """Return the divergence over the largest one at which the loss falls enough.

        Args:
            share: c in slope + divergence <= c * slope, the share of what the slope promises.
            floor: A divergence that is too small to matter, in nats.

        Returns:
            At most 1 where the loss falls enough; infinite where that is not known.
        """
        excess = self.divergence / max(floor, (share - 1) * self.slope)
        return math.inf if math.isnan(excess) else excess


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
        divergence, slope = _divergence_and_mean(logits.detach(), tangent)
        if isinstance(loss, str):
            self._reason = self._reason or loss
            weight = torch.full_like(divergence, math.nan)
        else:
            weight = loss.weight.to(divergence)
            slope = slope - loss.label_tangent(tangent)
        count = torch.ones_like(divergence)
        rows = [divergence, count, weight * divergence, weight * slope, weight, weight < 0]
        if mask is not None:
            rows = [row.where(mask, 0) for row in rows]
        self._sums.append(torch.stack([row.sum(dtype=torch.float64) for row in rows]))

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


def mean_change(mine: LossChange, divergence: Tensor, slope: Tensor, weight: Tensor) -> LossChange:
    """Return the change of the mean loss of the rows of all workers.

    Args:
        mine: That of this worker's rows, for its reason.
        divergence: That of each worker. Shape ``[N]``.
        slope: That of each worker. Shape ``[N]``.
        weight: That of each worker. Shape ``[N]``.

    Returns:
        The change; with equal weights of the workers where those of some rows are not known.
    """
    if bool(slope.isnan().any()):
        reason = mine.reason or "of another rank"
        return LossChange(float(divergence.mean()), weight=float(weight.sum()), reason=reason)
    total = weight.sum()
    divergence, slope = ((each * weight).sum() / total for each in (divergence, slope))
    return LossChange(float(divergence), float(slope), float(total))


def _divergence_and_mean(logits: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return log sum_k P_k exp(a_k) - m and m = sum_k P_k a_k of each row, ``[*B]`` in float64.

    In float64 the difference needs no series for small tangents: it is right to 1e-15.
    """
    classes = logits.shape[-1]
    elements = _CHUNK_ELEMENTS if logits.device.type == "cpu" else _CHUNK_ELEMENTS_DEVICE
    size = max(1, elements // classes)
    divergences, means = [], []
    for z, a in zip(
        logits.reshape(-1, classes).split(size), tangent.reshape(-1, classes).split(size),
        strict=True,
    ):  # fmt: skip
        log_share, a = z.double().log_softmax(dim=-1), a.double()
        means.append((log_share.exp() * a).sum(dim=-1))
        divergences.append(((log_share + a).logsumexp(dim=-1) - means[-1]).clamp(min=0.0))
    rows = logits.shape[:-1]
    return torch.cat(divergences).reshape(rows), torch.cat(means).reshape(rows)
