"""A Lightning callback that looks at the workers before they are averaged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from safestep._warn import warn_user
from safestep.parallel.shards import are_sharded
from safestep.workers.metrics import WorkerMetrics, WorkerReport

from .run_dir import default_run_dir

_LOGGED = (
    "loss_std",
    "loss_range",
    "grad_norm_std",
    "grad_norm_cv",
    "pairwise_cosine",
    "noise_scale",
)


class WorkerConsistency(Callback):
    """Show how far the workers of a Lightning run disagree before their gradients are averaged.

    Workers are the ranks of the DDP strategies. In a single process they are the batches of
    ``accumulate_grad_batches``, under automatic optimization. Training is left bitwise as it is.

    Logged at the trainer's ``log_every_n_steps``, the same on every rank: ``workers/loss_std``,
    ``workers/loss_range``, ``workers/grad_norm_std``, ``workers/grad_norm_cv``,
    ``workers/pairwise_cosine`` and ``workers/noise_scale``. A worker that is off is a warning of
    the logger "safestep" and an event of ``run.jsonl``, which also has every worker's numbers.

    Args:
        every: Measure every so many optimizer steps.
        pairwise_every: Of these, measure the pairwise cosine at every so many; with three or more
            ranks, or a comm hook, it takes an all-reduce of the size of the gradients.
        num_examples: Examples in a worker's batch, the unit of the noise scale; 1 gives it in
            workers' batches.
        run_dir: Directory of ``run.jsonl``; by default that of the logger's files.

    Raises:
        ValueError: If the ranks' strategy is not a DDP one: no rank has a gradient of its own.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[WorkerConsistency()], barebones=True)
    """

    def __init__(
        self,
        *,
        every: int = 1,
        pairwise_every: int = 10,
        num_examples: int = 1,
        run_dir: str | Path | None = None,
    ) -> None:
        self.metrics: WorkerMetrics | None = None
        self.last: WorkerReport | None = None
        self._run_dir = run_dir
        self._options = {
            "every": every,
            "pairwise_every": pairwise_every,
            "num_examples": num_examples,
        }
        self._state: dict[str, Any] = {}
        self._loss: Tensor | None = None
        self._batch_idx = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the model that the strategy made."""
        self._detach()
        run_dir = default_run_dir(trainer) if self._run_dir is None else self._run_dir
        model = trainer.strategy.model
        _check_strategy(trainer)
        self.metrics = WorkerMetrics(
            pl_module if model is None else model,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            run_dir=run_dir,
            **self._options,
        )
        if self._state:
            self.metrics.load_state_dict(self._state)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember where in the accumulation this batch is."""
        self._batch_idx = batch_idx

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Take the loss as ``training_step`` returned it: neither scaled nor divided."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._loss = loss.detach() * (factor / (scaler.get_scale() if scaler else 1.0))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, while the gradients are neither unscaled nor clipped."""
        if self.metrics is None or self._loss is None:
            return
        if trainer.world_size > 1:
            self.metrics.record(self._loss)
        elif trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization:
            self.metrics.record(self._loss, is_last=self._is_last_of_step(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured in this batch."""
        report = self.metrics.last if self.metrics else None
        if report is None or report is self.last:
            return
        self.last = report
        values = {name: getattr(report, name) for name in _LOGGED}
        found = {
            f"workers/{name}": value for name, value in values.items() if not math.isnan(value)
        }
        if found and not trainer.barebones:
            pl_module.log_dict(found, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove every hook; the final state stays for a checkpoint."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove every hook, so that training can be started again."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and the evidence on every worker, as plain numbers."""
        if self.metrics:
            self._state = self.metrics.state_dict()
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned; before training it is kept until training starts.

        Args:
            state_dict: The state; it is not changed.
        """
        self._state = state_dict
        if self.metrics:
            self.metrics.load_state_dict(state_dict)

    def _is_last_of_step(self, trainer: Trainer) -> bool:
        batches = self._batch_idx + 1
        return (
            batches % trainer.accumulate_grad_batches == 0
            or trainer.is_last_batch
            or batches >= trainer.num_training_batches
        )

    def _detach(self) -> None:
        self.state_dict()
        if self.metrics:
            self.metrics.detach()
        self.metrics = None


def _check_strategy(trainer: Trainer) -> None:
    """Refuse ranks without gradients of their own; warn where there is one worker.

    Raises:
        ValueError: If the ranks' strategy is neither a DDP one nor one of ``fully_shard``.
    """
    model = trainer.strategy.model
    is_watched = isinstance(model, DistributedDataParallel) or are_sharded(
        () if model is None else model.parameters()
    )
    if trainer.world_size > 1 and not is_watched:
        raise ValueError(
            "WorkerConsistency: expected a DDP strategy or ModelParallelStrategy with fully_shard, "
            f"got {type(trainer.strategy).__name__}. Use Trainer(strategy='ddp'), or leave the "
            "callback out."
        )
    if trainer.world_size == 1 and trainer.accumulate_grad_batches == 1:
        warn_user(
            "WorkerConsistency: one process without accumulate_grad_batches has one worker; "
            "nothing is measured."
        )
