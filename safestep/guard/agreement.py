"""Let every worker of a data-parallel run decide on the same measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from safestep.guard.controller import Finding, Measurement
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
        worst = _measurement(rows[radii.argmin()].tolist())
    else:
        reasons: list[str | None] = [None for _ in rows]
        dist.all_gather_object(reasons, measurement.reason, group=group)
        everyone = map(_measurement, rows.tolist())
        worst = worst_of([replace(m, reason=r) for m, r in zip(everyone, reasons, strict=True)])
    if measurement.is_partial:
        worst = replace(worst, step_norm=float(torch.linalg.vector_norm(step_norms)))
    return worst


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


def _measurement(row: Sequence[float]) -> Measurement:
    finding, radius, spread, bottleneck, step_norm = row
    return Measurement(Finding(int(finding)), radius, spread, int(bottleneck), step_norm)
