"""The micro-batches of gradient accumulation as workers of a single process."""

import torch
from torch import Tensor
from torch.nn import Module

from safestep.workers.dispersion import WorkerSums, worker_sums
from safestep.workers.kinds import MicroValues


class MicroBatches:
    """Take each micro-batch's gradient as what it adds to ``.grad``.

    All gradients of a step are kept until it ends: memory for one copy of the model per
    micro-batch. Each loss is expected to be divided by the number of micro-batches before backward,
    as usual; the gradients are multiplied by that number.

    Args:
        model: The model whose gradients accumulate.
        num_workers: Micro-batches in a step, unless the caller names the last one.
    """

    are_ranks = False
    checksums: Tensor | None = None  # one process has one copy of the parameters
    micro: MicroValues | None = None  # micro-batches are the workers here

    def __init__(self, model: Module, num_workers: int) -> None:
        self._model = model
        self._losses: list[Tensor] = []
        self._gradients: list[dict[str, Tensor]] = []
        self._accumulated: dict[str, Tensor] = {}
        self._is_measured = True
        self._added = 0
        self.num_workers = num_workers

    def begin_step(self, *, is_measured: bool) -> None:
        """Forget the last step; take the coming gradients if this one is measured."""
        self._losses.clear()
        self._gradients.clear()
        self._accumulated = {}
        self._added = 0
        self._is_measured = is_measured

    def add(self, loss: Tensor) -> None:
        """Take one backward's loss, and what it added to the gradients."""
        self._added += 1
        if not self._is_measured:
            return
        self._losses.append(loss.detach().double())
        accumulated = {
            name: parameter.grad.detach().to_dense().clone()
            if parameter.grad is not None
            else torch.zeros_like(parameter)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        before = self._accumulated
        self._gradients.append(
            {name: grad - before.get(name, 0) for name, grad in accumulated.items()}
        )
        self._accumulated = accumulated

    def is_complete(self, is_last: bool | None) -> bool:
        """Return whether the last backward ended the step: by default, if its number says so."""
        return self._added >= self.num_workers if is_last is None else is_last

    def sums(self, scale: float, *, with_pairs: bool) -> tuple[Tensor, WorkerSums]:
        """Return the micro-batches' losses and sums.

        Args:
            scale: Factor on the gradients, from a loss scaler.
            with_pairs: Has no effect: the pairs cost nothing here and are always measured.

        Returns:
            Losses ``[N]`` and sums, float64 on the CPU.
        """
        losses = torch.stack(self._losses).cpu()
        factor = (len(losses) / scale) ** 2
        sums = worker_sums(self._gradients)
        return losses, WorkerSums(
            sums.squared_norms.cpu() * factor,
            sums.mean_products.cpu() * factor,
            sums.mean_squared_norm.cpu() * factor,
            sums.unit_squared_norm.cpu(),
        )

    def detach(self) -> None:
        """Free the gradients that were kept."""
        self.begin_step(is_measured=False)
