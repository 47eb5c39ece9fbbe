"""The ranks of DistributedDataParallel as workers: sums of their gradients, on every rank."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from safestep.parallel.checksum import checksum
from safestep.workers.dispersion import WorkerSums, unit_squared_norm_of_two
from safestep.workers.kinds import MicroValues
from safestep.workers.local_gradients import LocalGradients, squared_norm


class DdpWorkers:
    """Collect the losses and gradient sums of all ranks, once per reduced backward.

    Args:
        ddp: The model. Its comm hook, registered before or later, stays in force; the mean gradient
            is the one that the hook delivers.
    """

    are_ranks = True

    def __init__(self, ddp: DistributedDataParallel) -> None:
        ignored = getattr(ddp, "parameters_to_ignore", ())
        self._ddp, self._group = ddp, ddp.process_group
        self._gradients = LocalGradients(
            [p for name, p in ddp.module.named_parameters() if name not in ignored],
            is_reduced=lambda: ddp.require_backward_grad_sync,
        )
        self._losses: list[Tensor] = []
        self._num_slots = 0  # for micro-batches: the same number on every rank
        self.checksums: Tensor | None = None
        self.micro: MicroValues | None = None
        self.num_workers = dist.get_world_size(self._group)

    def begin_step(self, *, is_measured: bool) -> None:
        """Forget the last step; keep the coming gradients if this one is measured."""
        self._losses.clear()
        self._gradients.clear()
        self._gradients.is_on = is_measured

    def add(self, loss: Tensor) -> None:
        """Take one backward's loss; the hooks already took the gradient."""
        if self._gradients.is_on:
            self._losses.append(loss.detach().double())
        self._gradients.end_backward()

    def is_complete(self, is_last: bool | None) -> bool:
        """Return whether the last backward ended the step: by default, if DDP reduced it."""
        return self._gradients.was_reduced if is_last is None else is_last

    def sums(self, scale: float, *, with_pairs: bool) -> tuple[Tensor, WorkerSums]:
        """Return all ranks' losses and sums: one small all-gather, and for pairs one all-reduce.

        Args:
            scale: Factor on the gradients, from a loss scaler.
            with_pairs: Measure the pairwise cosine. Two ranks without a comm hook need no
                all-reduce and always have it.

        Returns:
            Losses ``[N]`` and sums, float64 on the CPU; the same on every rank.
        """
        rank = dist.get_rank(self._group)
        added = self._gradients.added()
        sums = self._gradients.sums(share=rank, num_shares=self.num_workers)
        losses = torch.stack(self._losses).to(sums.device)
        parameters = checksum(self._gradients.parameters).to(sums.device)
        mine = torch.cat([losses.mean()[None], sums / scale**2, parameters])
        table, self.micro = self._gather(mine, losses, len(losses) * added.sqrt() / scale)
        self.checksums = table[:, 4:]
        losses, squared_norms, mean_products, mean_shares = table[:, :4].unbind(1)
        unit_squared_norm = torch.tensor(torch.nan, dtype=torch.float64)
        if self.num_workers == 2 and self._is_mean_exact():
            unit_squared_norm = unit_squared_norm_of_two(squared_norms, mean_products)
        elif self.num_workers > 1 and with_pairs:
            unit_squared_norm = self._unit_squared_norm(sums[0].sqrt())
        return losses, WorkerSums(
            squared_norms, mean_products, mean_shares.sum(), unit_squared_norm
        )

    def _gather(
        self, mine: Tensor, losses: Tensor, norms: Tensor
    ) -> tuple[Tensor, MicroValues | None]:
        """Return all ranks' numbers ``[N, K]``, and those of their micro-batches if there are any.

        Both travel in one message. A step with more micro-batches than any before takes a second
        one, with room for them.
        """
        count = len(losses)
        while True:
            slots = mine.new_full((2, self._num_slots), torch.nan)
            if count <= self._num_slots:
                slots[:, :count] = torch.stack((losses, norms))
            message = torch.cat([mine, mine.new_tensor([count]), slots.flatten()])
            everyone = [torch.empty_like(message) for _ in range(self.num_workers)]
            dist.all_gather(everyone, message, group=self._group)
            table = torch.stack(everyone).cpu()
            most = int(table[:, len(mine)].amax())
            if most <= max(1, self._num_slots):
                break
            self._num_slots = most
        if most == 1:
            return table[:, : len(mine)], None
        micro = table[:, len(mine) + 1 :].unflatten(1, (2, -1)).permute(1, 2, 0)[:, :most]
        return table[:, : len(mine)], MicroValues(*micro)

    def detach(self) -> None:
        """Remove every hook from the model."""
        self._gradients.detach()

    def _unit_squared_norm(self, norm: Tensor) -> Tensor:
        norms = []
        for piece in self._gradients.unit_pieces(norm):
            dist.all_reduce(piece, group=self._group)
            norms.append(squared_norm(piece))
        return torch.stack(norms).sum().cpu()

    def _is_mean_exact(self) -> bool:
        """Return whether no comm hook, which may compress, stands between workers and mean."""
        return not self._ddp._get_ddp_logging_data().get("comm_hook")
