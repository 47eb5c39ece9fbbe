"""A Lightning callback that compares the workers before their gradients are averaged."""

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

from .log_times import is_logged_now
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
    """Log how far the workers of a Lightning run disagree before their gradients are averaged.

    Workers are the ranks of a DDP strategy or of ``fully_shard``. In a single process they are the
    batches of ``accumulate_grad_batches``, under automatic optimization. Training stays bitwise the
    same.

    Logged at the trainer's ``log_every_n_steps``, the same on every rank: ``workers/loss_std``,
    ``workers/loss_range``, ``workers/grad_norm_std``, ``workers/grad_norm_cv``,
    ``workers/pairwise_cosine`` and ``workers/noise_scale``. A deviating worker causes a warning of
    the logger "safestep" and an event in ``run.jsonl``, which also has every worker's numbers and,
    where ranks accumulate, those of each micro-batch. Under ``fully_shard`` Lightning reduces each
    batch: the gradients of a step are then those of its last batch.

    Args:
        every: Number of optimizer steps from one measurement to the next.
        pairwise_every: Number of measured steps from one pairwise cosine to the next. Under DDP,
            with three or more ranks or a comm hook, it takes an all-reduce as large as the
            gradients.
        num_examples: Number of examples in a worker's batch, the unit of the noise scale; 1 gives
            it in workers' batches.
        run_dir: Directory of ``run.jsonl``; by default beside the files of the first logger.

    Raises:
        ValueError: At the start of training, if the strategy of several ranks is neither DDP nor
            ``fully_shard``: no rank then has a gradient of its own.

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
        """Attach to the model of the strategy."""
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
        """Store the index of the batch, which tells whether it ends an accumulation."""
        self._batch_idx = batch_idx

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Store the loss as ``training_step`` returned it: neither scaled nor divided."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._loss = loss.detach() * (factor / (scaler.get_scale() if scaler else 1.0))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, while the gradients are neither unscaled nor clipped."""
        if self.metrics is None or self._loss is None:
            return
        accumulates = trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization
        # DDP reduces only a step's last batch, which shows; fully_shard reduces each in Lightning.
        tells_itself = isinstance(trainer.strategy.model, DistributedDataParallel)
        if accumulates and not tells_itself:
            self.metrics.record(self._loss, is_last=self._is_last_of_step(trainer))
        elif trainer.world_size > 1:
            self.metrics.record(self._loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the measurement of this batch, if there is one."""
        report = self.metrics.last if self.metrics else None
        if report is None or report is self.last:
            return
        self.last = report
        values = {name: getattr(report, name) for name in _LOGGED}
        found = {
            f"workers/{name}": value for name, value in values.items() if not math.isnan(value)
        }
        if found and not trainer.barebones and is_logged_now(trainer):
            pl_module.log_dict(found, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove every hook; keep the final state for a checkpoint."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove every hook, so that training can start again."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and the evidence against each worker."""
        if self.metrics:
            self._state = self.metrics.state_dict()
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; before training it is kept until training starts.

        Args:
            state_dict: A result of `state_dict`; it is not changed.
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
    """Refuse a strategy whose ranks have no own gradients; warn if there is only one worker.

    Raises:
        ValueError: If the strategy of several ranks is neither DDP nor ``fully_shard``.
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
