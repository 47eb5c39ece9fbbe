"""The replicas of DistributedDataParallel as workers: their sums, on every rank."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from safestep.workers.ddp import LocalGradients, squared_norm
from safestep.workers.dispersion import WorkerSums, unit_squared_norm_of_two


class Replicas:
    """Collect the losses and gradient sums of all ranks, once per reduced backward.

    Args:
        ddp: The model; any comm hook that it has or will have stays in force, and the mean
            gradient is the one that the hook delivers.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        ignored = getattr(ddp, "parameters_to_ignore", ())
        self._ddp, self._group = ddp, ddp.process_group
        self._gradients = LocalGradients(
            [p for name, p in ddp.module.named_parameters() if name not in ignored],
            is_reduced=lambda: ddp.require_backward_grad_sync,
        )
        self._losses: list[Tensor] = []
        self.num_workers = dist.get_world_size(self._group)

    def add(self, loss: Tensor, *, is_measured: bool) -> None:
        """Take one backward's loss; the hooks already took the gradient."""
        if is_measured:
            self._losses.append(loss.detach().double())

    def is_complete(self, is_last: bool | None) -> bool:
        """Return whether the last backward ended the step."""
        return self._gradients.was_reduced if is_last is None else is_last

    def finish(self, scale: float, *, with_pairs: bool) -> tuple[Tensor, WorkerSums]:
        """Return all workers' losses and sums: one small all-gather, and for pairs one all-reduce.

        Args:
            scale: Factor on the gradients, from a loss scaler.
            with_pairs: Measure the pairwise cosine. Two workers without a comm hook need no
                all-reduce and always have it.

        Returns:
            Losses ``[N]`` and sums, float64 on the CPU; the same on every rank.
        """
        rank = dist.get_rank(self._group)
        sums = self._gradients.sums(share=rank, num_shares=self.num_workers)
        loss = torch.stack(self._losses).mean().to(sums.device)
        mine = torch.cat([loss[None], sums / scale**2])
        everyone = [torch.empty_like(mine) for _ in range(self.num_workers)]
        dist.all_gather(everyone, mine, group=self._group)
        losses, squared_norms, mean_products, mean_shares = torch.stack(everyone).cpu().unbind(1)
        unit_squared_norm = torch.tensor(torch.nan, dtype=torch.float64)
        if self.num_workers == 2 and self._is_mean_exact():
            unit_squared_norm = unit_squared_norm_of_two(squared_norms, mean_products)
        elif self.num_workers > 1 and with_pairs:
            unit = self._gradients.take_unit(sums[0].sqrt())
            dist.all_reduce(unit, group=self._group)
            unit_squared_norm = squared_norm(unit).cpu()
        self.clear()
        return losses, WorkerSums(
            squared_norms, mean_products, mean_shares.sum(), unit_squared_norm
        )

    def set_measuring(self, is_on: bool) -> None:
        """Keep the next step's gradients, or do not."""
        self._gradients.is_on = is_on

    def clear(self) -> None:
        """Forget the step so far."""
        self._losses.clear()
        self._gradients.clear()

    def detach(self) -> None:
        """Remove every hook from the model."""
        self._gradients.detach()

    def _is_mean_exact(self) -> bool:
        """Return whether no comm hook, which may compress, stands between workers and mean."""
        return not self._ddp._get_ddp_logging_data().get("comm_hook")
