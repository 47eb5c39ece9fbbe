"""Let every worker of a data-parallel run decide on the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isnan, nan

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from safestep.guard.health import Health
from safestep.guard.predictor import Measure, Predicted
from safestep.measure.update import Finding, Measurement
from safestep.parallel.collectives import gathered, world_size


def agree(measurement: Measurement, group: ProcessGroup | None = None) -> Measurement:
    """Return the measurement that all workers act on; without a process group, the one given.

    One small all-gather, which every rank of the group must run; a second one, of the reasons, only
    where a rank found an obstacle, which all know after the first.

    Args:
        measurement: This worker's.
        group: The workers; None for the default process group, if there is one.

    Returns:
        The smallest radius and the gravest finding over the workers.
    """
    if world_size(group) == 1:
        return measurement
    rows = gathered(
        (measurement.finding, measurement.radius, measurement.spread, measurement.bottleneck,
         measurement.step_norm), group,
    )  # fmt: skip
    findings, radii, _, _, step_norms = rows.unbind(1)
    if not findings.any():  # all measured: thousands of workers are not looked at one by one
        worst = _of_row(measurement, rows[radii.argmin()].tolist())
    else:
        reasons: list[str | None] = [None for _ in rows]
        dist.all_gather_object(reasons, measurement.reason, group=group)
        everyone = [_of_row(measurement, row) for row in rows.tolist()]
        worst = worst_of([replace(m, reason=r) for m, r in zip(everyone, reasons, strict=True)])
    if measurement.is_partial:
        worst = replace(worst, step_norm=float(torch.linalg.vector_norm(step_norms)))
    return worst


def agree_on_answer(answer: Predicted | Measure, group: ProcessGroup | None) -> Predicted | Measure:
    """Return the answer of the most careful worker: all measure where one would.

    The others would wait for it, or it for shards that no other gathers.

    Args:
        answer: This worker's.
        group: The workers; None for the default process group, if there is one.

    Returns:
        The largest r that any worker predicts, if all of them predict.
    """
    code = answer.normalized_step if isinstance(answer, Predicted) else _CODES[answer]
    worst = float(gathered([code], group).amax())  # NaN where any is
    if isnan(worst):
        return Measure.EXACTLY
    return Predicted(worst) if worst < inf else Measure.QUICKLY


def joint_health(health: Health, group: ProcessGroup | None, *, are_parts: bool) -> Health:
    """Return the sizes that the batch of all workers has: the norms, and the largest signals.

    They keep the number of workers out of the decision: each one's own data would look unusual now
    and then, and with enough workers there would be such a one in every step.

    Args:
        health: The sizes of this worker.
        group: The workers; None for the default process group, if there is one.
        are_parts: Whether the norms are those of this worker's shard.

    Returns:
        The norms over all workers, and the largest of each signal.
    """
    slots = [0.0] * _SLOTS  # as many on every worker
    for index, signal in enumerate(health.signals):
        # NaN is as unusual as infinity, and infinity stays the largest.
        slots[index % _SLOTS] = max(signal, slots[index % _SLOTS]) if signal == signal else inf
    rows = gathered([health.step_norm, health.gradient_norm, *slots], group)
    norms = rows[:, :2].norm(dim=0) if are_parts else rows[:, :2].amax(0)
    step_norm, gradient_norm = norms.tolist()
    return Health(step_norm, gradient_norm, tuple(rows[:, 2:].amax(0).tolist()))


_SLOTS = 3 * 8  # three signals each of eight outputs or micro-batches; those after share a slot
_CODES = {Measure.QUICKLY: inf, Measure.EXACTLY: nan}


def worst_of(measurements: Sequence[Measurement]) -> Measurement:
    """Return what all workers act on: the smallest radius and the gravest finding of any.

    Args:
        measurements: One of each worker, in the order of their ranks.

    Returns:
        The measurement that every worker decides on. Its reason names the rank; where ranks have
        other reasons, the first of each.
    """
    worst = max(measurements, key=lambda measurement: measurement.finding)
    measured = [m for m in measurements if m.finding is Finding.MEASURED]
    tightest = min(measured, key=lambda m: m.radius, default=worst)
    if worst.finding is Finding.MEASURED:
        return tightest
    first: dict[str, int] = {}  # rank that has a reason
    for rank, measurement in enumerate(measurements):
        if measurement.finding is worst.finding:
            first.setdefault(str(measurement.reason or measurement.finding), rank)
    reason = "; ".join(f"rank {rank}: {reason}" for reason, rank in first.items())
    return replace(tightest, finding=worst.finding, reason=reason)


def _of_row(mine: Measurement, row: Sequence[float]) -> Measurement:
    finding, radius, spread, bottleneck, step_norm = row
    return replace(
        mine, finding=Finding(int(finding)), radius=radius, spread=spread,
        bottleneck=int(bottleneck), step_norm=step_norm, reason=None, is_partial=False,
    )  # fmt: skip
