"""Layer 3: let every worker of a data-parallel run decide on the same numbers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from safestep.controller import Finding, Measurement, worst_of


def agree(measurement: Measurement, group: ProcessGroup | None = None) -> Measurement:
    """Return the measurement that all workers act on; without a process group, the one given.

    One small all-gather, which every rank of the group must run in every step.

    Args:
        measurement: This worker's.
        group: The workers; None for the default process group, if there is one.

    Returns:
        The smallest radius and the gravest finding over the workers.
    """
    if world_size(group) == 1:
        return measurement
    mine = torch.tensor(
        [
            measurement.finding, measurement.radius, measurement.spread,
            measurement.bottleneck, measurement.step_norm,
        ],
        dtype=torch.float64, device=_device(group),
    )  # fmt: skip
    everyone = torch.empty(world_size(group), len(mine), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return worst_of(
        [
            Measurement(Finding(int(finding)), radius, spread, int(bottleneck), step_norm)
            for finding, radius, spread, bottleneck, step_norm in everyone.tolist()
        ]
    )


def world_size(group: ProcessGroup | None = None) -> int:
    """Return the number of workers, 1 where there is no process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """Return this worker's rank, 0 where there is no process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def _device(group: ProcessGroup | None) -> torch.device:
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
