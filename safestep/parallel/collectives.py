"""Gather numbers from every rank."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from safestep.parallel.shards import are_sharded

_is_initialized = getattr(dist, "is_initialized", bool)  # which some builds of torch lack


def gathered(numbers: Sequence[float], group: ProcessGroup | None = None) -> Tensor:
    """Return the numbers of every worker.

    Runs one small all-gather, which every rank of the group must run.

    Args:
        numbers: This worker's numbers; the same count on every worker.
        group: The workers; None for the default process group, if there is one.

    Returns:
        A float64 tensor on the CPU of shape ``[N, K]``: a row for each worker, by rank.
    """
    if world_size(group) == 1:
        return torch.tensor([numbers], dtype=torch.float64)
    mine = torch.tensor(numbers, dtype=torch.float64, device=_device(group))
    rows = mine.new_empty(world_size(group), len(numbers))
    dist.all_gather(list(rows), mine, group=group)
    return rows.cpu()


def apart_from_shards(
    params: Sequence[Tensor], group: ProcessGroup | None = None
) -> ProcessGroup | None:
    """Return the group in which workers agree: a new one where parameters are sharded.

    A rank that raises during a re-run leaves the others waiting in an all-gather of shards. If it
    then talked to them in the same group, its message would be received as a shard. In a group of
    its own the message arrives after the all-gather has timed out, and all ranks learn the reason.

    Args:
        params: The trained parameters.
        group: The workers; None for the default process group, if there is one.

    Returns:
        The group.
    """
    if world_size(group) == 1 or not are_sharded(params):
        return group
    ranks = dist.get_process_group_ranks(group)
    # The rank that raised waits longer than the others' timeout, after which they get here.
    options = {"timeout": 2 * group_timeout(group), "use_local_synchronization": True}
    return dist.new_group(ranks, **options)  # type: ignore[return-value]


def is_of_collective(error: BaseException) -> bool:
    """Return whether a collective failed, after which its group is lost: a rank did not take part.

    Args:
        error: What was raised.
    """
    kinds = getattr(dist, "DistError", ()), getattr(dist, "DistBackendError", ())
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def group_timeout(group: ProcessGroup | None = None) -> timedelta:
    """Return how long the collectives of a group wait for a rank."""
    whole = group or dist.group.WORLD
    return whole._get_backend(_device(group)).options._timeout  # type: ignore[union-attr]


def world_size(group: ProcessGroup | None = None) -> int:
    """Return the number of workers, 1 where there is no process group."""
    return dist.get_world_size(group) if _is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """Return this worker's rank, 0 where there is no process group."""
    return dist.get_rank(group) if _is_initialized() else 0


def _device(group: ProcessGroup | None) -> torch.device:
    """Return a device that the group communicates from: the CPU, if it does."""
    devices = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])
