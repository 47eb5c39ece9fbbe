"""A Lightning callback that keeps every optimizer step within the convergence radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from safestep.guard.options import Action
from safestep.guard.safe_step import SafeStep
from safestep.guard.step_report import StepReport
from safestep.measure.estimator_registry import EstimatorOption
from safestep.measure.inner_radii import RadiusName
from safestep.radius.bounds import RungOption

from .log_times import is_logged_now
from .run_dir import default_run_dir
from .submodule import modules_to_watch
from .training_step import announce_training_step, quiet, takes_iterator


class StepSafety(Callback):
    """Keep every optimizer step of a Lightning run within the softmax convergence radius.

    Every optimizer of the trainer gets a SafeStep. Under automatic optimization it measures by
    running ``training_step`` again, so the logits are those from which the loss was computed. A
    ``training_step`` that makes the optimizer steps itself (manual optimization) or fetches its
    batch itself (``dataloader_iter``) cannot be run again. SafeStep then runs the forward calls of
    a submodule again: the smallest that holds all trained parameters, or those of one optimizer.

    If an optimizer's logits are the output of another module, as for a GAN's generator that is
    trained through a discriminator, the step is "unmeasured". To have it measured, call
    ``step_safety.record(0, self.generator_loss, noise)`` just before the loss is computed.

    Logged in the first 50 steps and at the trainer's ``log_every_n_steps``:
    ``safestep/normalized_step`` (on the progress bar as ``r``, always), ``safestep/radius``,
    ``safestep/step_norm``, ``safestep/scale``,
    ``safestep/effective_lr`` and, of measured steps, ``safestep/divergence``,
    ``safestep/loss_slope``, their sum ``safestep/predicted_change`` and
    ``safestep/gradient_ratio``. With several optimizers each name ends in the optimizer's index,
    and ``safestep/normalized_step`` is the sum, which bounds the r of their joint step.

    Args:
        max_normalized_step: Largest allowed r. 1.0 is the radius itself.
        radius: "bound" is pi / spread; "certified" is larger and still proven.
        estimator: How to measure; see SafeStep.
        action: "clip" scales down a step with r over the limit; "set" scales every step to
            r = the limit, up or down; "monitor" only measures.
        logits: Function from the result of ``training_step`` (under manual optimization: from the
            submodule's output) to the logits, if they are not found automatically.
        quantile: Apply the limit to this quantile of the rows' r, not to the largest. A step within
            the limit is then not certified for every row.
        radii: Which radii to log; see SafeStep.
        run_dir: Directory for ``run.jsonl``; by default beside the files of the first logger.
        max_consecutive_skips: Number of consecutive skipped steps after which training ends with
            an error.
        copy: False copies neither parameters nor optimizer state; see SafeStep.
        replica_check_interval: Number of steps between checksums of all replicas; see SafeStep.
        audit_interval: Audit the gradient at least at one in so many steps; see SafeStep.
        sufficient_decrease: Leave steps over the limit alone whose linearised loss falls by this
            share of what its slope promises; see SafeStep.
        rollback: Number of steps that can be undone, each kept as a copy; see SafeStep.
        rollback_after: Number of skipped or clipped steps in a row that undo them; see SafeStep.
        keep_batches: Largest number of files with inputs of clipped or skipped steps; see SafeStep.

    Attributes:
        guards: One SafeStep for each optimizer during training, else empty.
        last: The latest StepReport of each optimizer, None for one that has not stepped.

    Reference:
        Ghosts of Softmax: Complex Singularities That Limit Safe Step Sizes in Cross-Entropy,
        arXiv:2603.13552, Thm 4.6 and Sec. 6.5.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(
        ...     callbacks=[StepSafety(radius="certified")], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
    """

    def __init__(
        self,
        *,
        max_normalized_step: float = 1.0,
        radius: RungOption = "bound",
        estimator: EstimatorOption = "auto",
        action: Action = "clip",
        logits: Callable[[Any], Any] | None = None,
        quantile: float | None = None,
        radii: Collection[RadiusName] = ("output",),
        run_dir: str | Path | None = None,
        max_consecutive_skips: int = 25,
        copy: bool = True,
        replica_check_interval: int | None = None,
        audit_interval: int | None = None,
        sufficient_decrease: float | None = None,
        rollback: int | None = None,
        rollback_after: int | None = None,
        keep_batches: int = 0,
    ) -> None:
        self.guards: list[SafeStep] = []
        self.last: list[StepReport | None] = []
        self._run_dir = run_dir
        self._options: dict[str, Any] = {
            "max_normalized_step": max_normalized_step,
            "radius": radius,
            "estimator": estimator,
            "action": action,
            "logits": logits,
            "quantile": quantile,
            "radii": radii,
            "max_consecutive_skips": max_consecutive_skips,
            "copy": copy,
            "replica_check_interval": replica_check_interval,
            "audit_interval": audit_interval,
            "sufficient_decrease": sufficient_decrease,
            "rollback": rollback,
            "rollback_after": rollback_after,
            "keep_batches": keep_batches,
        }
        self._states: list[dict[str, Any]] = []
        self._loss: Tensor | float = 0.0
        self._put_back: Callable[[], None] = _nothing
        self._quietly: Callable[[Callable[..., Any]], Callable[..., Any]] = _unchanged
        self._is_told = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach a SafeStep to every optimizer; the learning-rate finder has finished by now."""
        run_dir = default_run_dir(trainer) if self._run_dir is None else self._run_dir
        self._detach()
        self._quietly = lambda function: quiet(trainer, pl_module)(function)
        self._is_told = pl_module.automatic_optimization and not takes_iterator(pl_module)
        parts: list[nn.Module] = [pl_module for _ in trainer.optimizers]
        if not self._is_told:
            parts = modules_to_watch(pl_module, trainer.optimizers)
        for optimizer, part in zip(trainer.optimizers, parts, strict=True):
            guard = SafeStep(optimizer, pl_module, part=part, run_dir=run_dir, **self._options)
            guard.enabled = False
            self.guards.append(guard)
        self.last = [None for _ in self.guards]
        self._load_states()

    def record(self, index: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Name the call that computes the loss of an optimizer's next step, just before it runs.

        For manual optimization. Like ``SafeStep.record``, it runs `function` again to measure; what
        `function` logs counts only in its first run. Outside training, nothing happens.

        Args:
            index: Index of the optimizer, in the order of ``configure_optimizers``.
            function: The function that is about to be called; it returns the loss.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.
        """
        if self.guards and self.guards[index].enabled:
            self.guards[index].record(self._quietly(function), *args, **kwargs)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enable the guards for this batch, and prepare to record its ``training_step``."""
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        # True while StochasticWeightAveraging runs an epoch for the statistics of BatchNorm.
        is_without_steps = getattr(loop, "_skip_backward", False)
        for guard in self.guards:
            guard.enabled = not is_without_steps
        if is_without_steps or not self._is_told:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            # Lightning zeroes the gradients, so calls recorded for a skipped step (inf) are void.
            self._loss = 0.0
            self.guards[0].forget()
        self._put_back()
        self._put_back = announce_training_step(trainer, pl_module, self.guards[0].record)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Pass the loss to the run log: the sum of the parts of accumulated batches."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        unscaled = loss.detach() if scaler is None else loss.detach() / scaler.get_scale()
        self._loss = unscaled + (self._loss if pl_module.automatic_optimization else 0.0)
        for index, guard in enumerate(self.guards):
            guard.log(loss=self._loss, **({"optimizer": index} if len(self.guards) > 1 else {}))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the optimizer steps of this batch."""
        reports: dict[int, StepReport] = {}
        for index, guard in enumerate(self.guards):
            guard.enabled = False
            if guard.last is not None and guard.last is not self.last[index]:
                reports[index] = self.last[index] = guard.last
        if not reports or trainer.barebones:
            return
        joint = sum(report.normalized_step for report in reports.values())
        is_logged = is_logged_now(trainer)
        if is_logged:
            pl_module.log_dict(self._metrics(reports), batch_size=1)
            pl_module.log("safestep/normalized_step", joint, batch_size=1)
        if is_logged or trainer.progress_bar_callback is not None:
            pl_module.log("r", joint, prog_bar=True, logger=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove every hook; keep the final state for a checkpoint."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove every hook, so that training can start again."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every optimizer's guard, as plain numbers."""
        if self.guards:
            self._states = [guard.state_dict() for guard in self.guards]
        return {"guards": self._states} if self._states else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; before training it is kept until the guards exist.

        Args:
            state_dict: A result of `state_dict`; it is not changed.
        """
        self._states = state_dict["guards"]
        if self.guards:
            self._load_states()

    def _load_states(self) -> None:
        if self._states and len(self._states) != len(self.guards):
            raise ValueError(
                f"StepSafety: expected a checkpoint of {len(self.guards)} optimizers, got one of "
                f"{len(self._states)}. Resume with the optimizers it was made with."
            )
        for guard, state in zip(self.guards, self._states, strict=False):
            guard.load_state_dict(state)

    def _detach(self) -> None:
        self._put_back()
        self._put_back = _nothing
        self._quietly = _unchanged
        self.state_dict()
        for guard in self.guards:
            guard.detach()
        self.guards = []

    def _metrics(self, reports: dict[int, StepReport]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for index, report in reports.items():
            ending = f"/{index}" if len(self.guards) > 1 else ""
            metrics[f"safestep/radius{ending}"] = report.radius
            metrics[f"safestep/step_norm{ending}"] = report.step_norm
            metrics[f"safestep/scale{ending}"] = report.scale
            metrics[f"safestep/effective_lr{ending}"] = report.effective_learning_rate
            if not math.isnan(report.gradient_ratio):
                metrics[f"safestep/gradient_ratio{ending}"] = report.gradient_ratio
            metrics[f"safestep/divergence{ending}"] = report.divergence
            metrics[f"safestep/loss_slope{ending}"] = report.loss_slope
            metrics[f"safestep/predicted_change{ending}"] = report.predicted_change
            if ending:
                metrics[f"safestep/normalized_step{ending}"] = report.normalized_step
        return metrics


def _nothing() -> None:
    pass


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
