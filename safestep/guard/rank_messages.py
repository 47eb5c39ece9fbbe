"""What a rank tells the others of a step, in numbers, and what all of them then act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safestep.guard.health import Health
from safestep.measure.slopes import SlopesMessage, over_ranks
from safestep.measure.update import Finding, Measurement
from safestep.parallel.present import ABSENT
from safestep.radius.loss_change import mean_change

_SLOTS = 3 * 8  # three signals each of eight outputs or micro-batches; those after share a slot


@dataclass(frozen=True, slots=True)
class RuledOut:
    """Which cheaper ways to find r are ruled out for an update.

    Attributes:
        prediction: Whether it must be measured.
        secant: Whether a secant will not do.
        sampling: Whether a part of the batch will not do.
    """

    prediction: bool
    secant: bool
    sampling: bool


class SizesMessage(NamedTuple):
    """What a rank tells of an update before that is predicted or measured.

    A field is a number of one rank; a column of all ranks, shape ``[N]``; or what they reduce to.
    """

    step_norm: Any
    fingerprint: Any
    gradient_norm: Any
    prediction: Any  # these three as in `RuledOut`
    secant: Any
    sampling: Any
    trail: Any  # equal on ranks that predict the same
    signals: Any

    @classmethod
    def of(cls, health: Health, ruled_out: RuledOut, trail: float) -> SizesMessage:
        """Return the message of a rank."""
        slots = [0.0] * _SLOTS  # as many on every rank
        for index, signal in enumerate(health.signals):
            # NaN is as unusual as infinity, and infinity stays the largest.
            slots[index % _SLOTS] = max(signal, slots[index % _SLOTS]) if signal == signal else inf
        return cls(
            health.step_norm, health.fingerprint, health.gradient_norm, ruled_out.prediction,
            ruled_out.secant, ruled_out.sampling, trail, slots,
        )  # fmt: skip

    def pack(self) -> list[float]:
        """Return the numbers to send."""
        *numbers, signals = self
        return [*numbers, *signals]

    @classmethod
    def unpack(cls, numbers: Sequence[Any]) -> SizesMessage:
        """Return the message with these numbers or columns, in the order of `pack`."""
        first = cls._fields.index("signals")
        return cls._make((*numbers[:first], numbers[first:]))


class MeasurementMessage(NamedTuple):
    """What a rank tells of its measurement. The fields are numbers, or columns of all ranks."""

    finding: Any
    radius: Any
    spread: Any
    bottleneck: Any
    step_norm: Any
    fingerprint: Any  # of the update
    divergence: Any
    loss_slope: Any
    loss_weight: Any
    is_new: Any  # whether its reason is another one than at the step before
    is_lost: Any  # whether another rank left it waiting
    slopes: SlopesMessage

    @classmethod
    def of(
        cls, mine: Measurement, fingerprint: float, state: float, *, is_new: bool
    ) -> MeasurementMessage:
        """Return the message of a rank."""
        return cls(
            mine.finding, mine.radius, mine.spread, mine.bottleneck, mine.step_norm, fingerprint,
            mine.loss.divergence, mine.loss.slope, mine.loss.weight, is_new,
            mine.is_lost,
            SlopesMessage.of(mine.slopes, state),
        )  # fmt: skip

    def pack(self) -> list[float]:
        """Return the numbers to send."""
        *numbers, slopes = self
        return [*numbers, *slopes]

    @classmethod
    def unpack(cls, numbers: Sequence[Any]) -> MeasurementMessage:
        """Return the message with these numbers or columns, in the order of `pack`."""
        first = cls._fields.index("slopes")
        return cls._make((*numbers[:first], SlopesMessage(*numbers[first:])))

    def measurement(self, mine: Measurement) -> Measurement:
        """Return the measurement of the rank that sent these numbers, but for its texts."""
        return replace(
            mine, finding=Finding(int(self.finding)), radius=self.radius, spread=self.spread,
            bottleneck=int(self.bottleneck), step_norm=self.step_norm, is_partial=False,
        )  # fmt: skip


def agreed_sizes(mine: Health, rows: Tensor, *, copies: float | None) -> tuple[Health, RuledOut]:
    """Return the sizes of the batch of all ranks, and what any rank rules out.

    Args:
        mine: The sizes of this rank.
        rows: The packed `SizesMessage` of each rank. Shape ``[N, K]``.
        copies: Where the norms are those of shards, how often the ranks hold all of them.

    Returns:
        The norms over all ranks, and the largest of each signal; what any of them rules out, a
        prediction too where they would predict differently.
    """
    largest = SizesMessage.unpack(rows.amax(0).tolist())
    norms = largest
    if copies is not None:
        norms = SizesMessage.unpack((rows.norm(dim=0) / sqrt(copies)).tolist())
    trails = SizesMessage.unpack(rows.unbind(1)).trail
    is_one_trail = bool(((trails == largest.trail) | (trails == ABSENT)).all())
    ruled_out = RuledOut(
        bool(largest.prediction) or not is_one_trail, bool(largest.secant), bool(largest.sampling)
    )
    signals = tuple(largest.signals)
    return Health(norms.step_norm, norms.gradient_norm, signals, mine.fingerprint), ruled_out


def agreed_measurement(
    mine: Measurement, rows: Tensor, reasons: Sequence[str | None], copies: float | None = None
) -> Measurement:
    """Return the measurement that all ranks act on.

    Args:
        mine: This rank's.
        rows: The packed `MeasurementMessage` of each rank. Shape ``[N, K]``.
        reasons: Those of all ranks; not read if every rank has measured.
        copies: Where ranks measured shards, how often they hold all of them.

    Returns:
        The smallest radius and the gravest finding over the ranks, the change of their mean loss.
    """
    columns = MeasurementMessage.unpack(rows.unbind(1))
    is_present = columns.finding != ABSENT
    if not columns.finding.any():  # thousands of ranks are not looked at one by one
        tightest = rows[columns.radius.argmin()].tolist()
        worst = MeasurementMessage.unpack(tightest).measurement(mine)
    else:
        everyone = [MeasurementMessage.unpack(row) for row in rows.tolist()]
        worst = worst_of([
            None if rank.finding == ABSENT else replace(rank.measurement(mine), reason=reason)
            for rank, reason in zip(everyone, reasons, strict=True)
        ])  # fmt: skip
    if copies is not None:
        norm = float(torch.linalg.vector_norm(columns.step_norm)) / sqrt(copies)
        worst = replace(worst, step_norm=norm)
    changes = columns.divergence, columns.loss_slope, columns.loss_weight
    slopes = SlopesMessage(*(column.tolist() for column in columns.slopes))
    return replace(
        worst, row=None, loss=mean_change(mine.loss, *(each[is_present] for each in changes)),
        slopes=over_ranks(
            mine.slopes, slopes, copies=copies, is_whole=bool(is_present.all())
        ),
    )  # fmt: skip


def worst_of(measurements: Sequence[Measurement | None]) -> Measurement:
    """Return what all ranks act on: the smallest radius and the gravest finding of any.

    Args:
        measurements: One of each rank, in their order; None of one that has no more data.

    Returns:
        The measurement that every rank decides on. Its reason names the rank; where ranks have
        other reasons, the first of each.
    """
    present = {rank: m for rank, m in enumerate(measurements) if m is not None}
    worst = max(present.values(), key=lambda measurement: measurement.finding)
    measured = [m for m in present.values() if m.finding is Finding.MEASURED]
    tightest = min(measured, key=lambda m: m.radius, default=worst)
    if worst.finding is Finding.MEASURED:
        return tightest
    first: dict[str, int] = {}  # rank that has a reason
    for rank, measurement in present.items():
        if measurement.finding is worst.finding:
            first.setdefault(str(measurement.reason or measurement.finding), rank)
    reason = "; ".join(f"rank {rank}: {reason}" for reason, rank in first.items())
    return replace(tightest, finding=worst.finding, reason=reason)
