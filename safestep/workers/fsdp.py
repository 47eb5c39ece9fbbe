"""The ranks of fully_shard as workers: their gradients, just before they are reduced."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from safestep.parallel.shards import is_sharded, sharding_modules
from safestep.workers.dispersion import WorkerSums, add_to_gram, sums_of_gram
from safestep.workers.kinds import MicroValues


class FsdpWorkers:
    """Collect all inner products of the ranks' gradients, one reduce-scatter at a time.

    A rank holds its whole own gradient of a group of parameters until ``fully_shard`` reduces it,
    and then only its shard of the mean. Just before, an all-to-all of the same size gives each rank
    all workers' gradients of its own shard; it adds up their inner products. Steps that are not
    measured pay nothing. A measured one pays one more transfer of the size of the gradients, and
    memory for one group of parameters.

    Where ranks accumulate gradients and reduce them at the end of a step, the norms of the
    micro-batches' own gradients are not known. Where every backward pass is reduced, they are, and
    the step's gradients are those of its last micro-batch.

    Args:
        model: A module that ``fully_shard`` was applied to, itself or to parts of it.

    Raises:
        ValueError: If parameters are distributed in another way besides.
    """

    are_ranks = True
    checksums: Tensor | None = None  # no rank has a replica

    def __init__(self, model: Module) -> None:
        mesh = _only_mesh(model)
        self._group = mesh.get_group()
        self._losses: list[Tensor] = []
        self.num_workers = mesh.size()
        self.gram: Tensor | None = None  # of the backward pass under way
        self._grams: list[Tensor | None] = []  # of each backward pass, None if it was not reduced
        self.micro: MicroValues | None = None
        self.is_measured, self.was_reduced = True, False
        self._modules = list(sharding_modules(model))
        self._own = [_comm_of(module) for module in self._modules]
        for module, own in zip(self._modules, self._own, strict=True):
            module.set_custom_reduce_scatter(_Listener(own, self))

    def begin_step(self, *, is_measured: bool) -> None:
        """Forget the last step; look at the coming gradients if this one is measured."""
        self._losses.clear()
        self._grams.clear()
        self.gram, self.is_measured, self.was_reduced = None, is_measured, False

    def add(self, loss: Tensor) -> None:
        """Take one backward's loss; its gradients were seen when they were reduced."""
        if self.is_measured:
            self._losses.append(loss.detach().double())
            self._grams.append(self.gram)
            self.gram = None

    def is_complete(self, is_last: bool | None) -> bool:
        """Return whether the last backward ended the step: by default, if it was reduced."""
        return self.was_reduced if is_last is None else is_last

    def sums(self, scale: float, *, with_pairs: bool) -> tuple[Tensor, WorkerSums]:
        """Return all ranks' losses and sums, from one small all-reduce.

        Args:
            scale: Factor on the gradients, from a loss scaler.
            with_pairs: Has no effect: all pairs are known.

        Returns:
            Losses ``[N]`` and sums, float64 on the CPU; the same on every rank.
        """
        losses, size = torch.stack(self._losses), self.num_workers
        count, last = len(losses), self._grams[-1]
        gram = losses.new_zeros(size, size) if last is None else last / scale**2
        norms = losses.new_full((count, size), torch.nan)
        if count > 1 and None not in self._grams:  # each was reduced, with a part of the loss
            gram = gram * count**2
            norms = torch.stack([g.diagonal() for g in self._grams if g is not None])
            norms = norms * (count / scale) ** 2
        mine = losses.new_zeros(count + 1, size)
        mine[:, dist.get_rank(self._group)] = torch.cat([losses.mean()[None], losses])
        table = torch.cat([mine[:1], gram, mine[1:], norms])
        dist.all_reduce(table, group=self._group)
        mean, gram, losses, norms = table.cpu().split([1, size, count, count])
        self.micro = MicroValues(losses, norms.sqrt()) if count > 1 else None
        return mean[0], sums_of_gram(gram)

    def detach(self) -> None:
        """Give every module its own reduction back."""
        for module, own in zip(self._modules, self._own, strict=True):
            module.set_custom_reduce_scatter(own)

    def see(self, gradients: Tensor, group: Any, predivided: float) -> None:
        """Add the inner products of all workers' gradients of this rank's shard.

        Args:
            gradients: This worker's gradient, shard after shard, as it is going to be reduced.
            group: The workers.
            predivided: What the gradient was divided by.
        """
        self.was_reduced = True
        if not self.is_measured:
            return
        shards = torch.empty_like(gradients)
        dist.all_to_all_single(shards, gradients, group=group)
        self.gram = add_to_gram(self.gram, shards.view(self.num_workers, -1), predivided**2)


class _Listener:
    """A reduce-scatter of ``fully_shard`` that shows the gradients before it reduces them.

    Args:
        own: The module's own reduce-scatter.
        workers: Sees the gradients.
    """

    def __init__(self, own: Any, workers: FsdpWorkers) -> None:
        self._own, self._workers = own, workers

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the memory that the module's own reduce-scatter allocates."""
        return self._own.allocate(*args, **kwargs)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **kwargs: Any
    ) -> Any:
        """Return what the module's own reduce-scatter returns, after the gradients were shown."""
        self._workers.see(input_tensor, group, _predivided(input_tensor.dtype, op, group.size()))
        return self._own(output_tensor, input_tensor, group, op, **kwargs)


def _predivided(dtype: torch.dtype, op: Any, num_workers: int) -> float:
    """Return what ``fully_shard`` divides float16 gradients by before it sums them."""
    if dtype in (torch.float32, torch.bfloat16) or op != dist.ReduceOp.SUM:
        return 1.0
    factor = 1
    while num_workers % factor == 0 and num_workers / factor > factor:
        factor *= 2
    return float(factor)


def _comm_of(module: Any) -> Any:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return groups[0]._reduce_scatter_comm if groups[0] is not None else None


def _only_mesh(model: Module) -> Any:
    """Return the device mesh of all sharded parameters.

    Raises:
        ValueError: If there are several, or one of several dimensions.
    """
    sharding = list(sharding_modules(model))
    meshes = [p.device_mesh for p in model.parameters() if is_sharded(p)]  # type: ignore[attr-defined]
    if not sharding:
        raise ValueError(
            "WorkerMetrics: expected ranks that train on data of their own, got parameters that "
            "are distributed without data parallelism (tensor parallelism alone). All ranks then "
            "compute one gradient together, and there is nothing to compare."
        )
    if any(mesh != meshes[0] for mesh in meshes) or meshes[0].ndim > 1:
        raise ValueError(
            "WorkerMetrics: expected `model` to be sharded by fully_shard over one mesh of one "
            f"dimension, got {meshes[0]}. With replicas of shards, or with tensor parallelism "
            "inside, a rank's reduction holds a part of a worker's gradient only."
        )
    if not hasattr(sharding[0], "set_custom_reduce_scatter"):
        raise ValueError(
            "WorkerMetrics: expected a torch in which a module of fully_shard has "
            f"set_custom_reduce_scatter, got {torch.__version__}. Update torch."
        )
    return meshes[0]
