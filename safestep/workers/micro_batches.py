"""The micro-batches of gradient accumulation as virtual workers of a single process."""

import torch
from torch import Tensor
from torch.nn import Module

from safestep.workers.dispersion import WorkerSums, worker_sums


class MicroBatches:
    """Take each micro-batch's gradient as what it adds to ``.grad``.

    The gradients of one step are all kept until it ends, so memory grows by one copy of the model
    a micro-batch. As is usual, each loss is taken to be divided by the number of micro-batches
    before backward; the gradients are multiplied by that number.

    Args:
        model: The model whose gradients accumulate.
        num_workers: Micro-batches in a step, where the caller does not tell the last one.
    """

    def __init__(self, model: Module, num_workers: int) -> None:
        self._model = model
        self._losses: list[Tensor] = []
        self._gradients: list[dict[str, Tensor]] = []
        self._accumulated: dict[str, Tensor] = {}
        self._is_on = True
        self._added = 0
        self.num_workers = num_workers

    def add(self, loss: Tensor, *, is_measured: bool) -> None:
        """Take one backward's loss, and what it added to the gradients."""
        self._added += 1
        if not is_measured:
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
        """Return whether the last backward ended the step."""
        return self._added >= self.num_workers if is_last is None else is_last

    def finish(self, scale: float, *, with_pairs: bool) -> tuple[Tensor, WorkerSums]:
        """Return the micro-batches' losses and sums.

        Args:
            scale: Factor on the gradients, from a loss scaler.
            with_pairs: The pairs are always measured; they cost nothing here.

        Returns:
            Losses ``[N]`` and sums, float64 on the CPU.
        """
        losses = torch.stack(self._losses).cpu()
        factor = (len(losses) / scale) ** 2
        sums = worker_sums(self._gradients)
        self.clear()
        return losses, WorkerSums(
            sums.squared_norms.cpu() * factor,
            sums.mean_products.cpu() * factor,
            sums.mean_squared_norm.cpu() * factor,
            sums.unit_squared_norm.cpu(),
        )

    def set_measuring(self, is_on: bool) -> None:
        """Nothing to prepare: gradients are read after backward."""

    def clear(self) -> None:
        """Forget the step so far."""
        self._losses.clear()
        self._gradients.clear()
        self._accumulated = {}
        self._added = 0

    def detach(self) -> None:
        """Nothing is attached to the model."""
