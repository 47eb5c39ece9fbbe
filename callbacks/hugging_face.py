"""A callback of Hugging Face's Trainer that keeps every step within its convergence radius."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from safestep.guard.options import Action
from safestep.guard.safe_step import SafeStep
from safestep.guard.step_report import StepReport
from safestep.measure.estimator_registry import EstimatorOption
from safestep.measure.inner_radii import RadiusName
from safestep.radius.bounds import RungOption


class StepSafetyCallback(TrainerCallback, ExportableState):
    """Keep every optimizer step of a ``transformers.Trainer`` within its convergence radius.

    ``Trainer(..., callbacks=[StepSafetyCallback()])`` is all: the model and the optimizer are taken
    when training begins. Trainers built on it (TRL's, for instance) take the callback as well.

    The Trainer's logs, and the trackers that it reports to, get ``safestep/normalized_step``,
    ``safestep/radius``, ``safestep/step_norm``, ``safestep/scale`` and ``safestep/effective_lr`` of
    the latest step; where it was measured, ``safestep/divergence``, ``safestep/loss_slope``, their
    sum ``safestep/predicted_change`` and ``safestep/gradient_ratio``; and ``safestep/clipped``,
    ``safestep/skipped`` and ``safestep/unmeasured``, the numbers of such steps since the log
    before. The guard's state is in the Trainer's checkpoints;
    ``trainer.train(resume_from_checkpoint=...)`` goes on from it.

    ``run.jsonl`` has the loss as the model returns it. Where the Trainer computes the loss itself
    (``label_smoothing_factor``, ``compute_loss_func``), the log has none.

    Args:
        max_normalized_step: Largest r that is let through. 1.0 is the radius itself.
        radius: "bound" is pi / spread; "certified" is larger and still proven.
        estimator: How to measure; see SafeStep.
        action: "clip" scales down a step with r over the limit; "set" scales every step to
            r = the limit, up or down; "monitor" only measures.
        logits: How to get from the model's output to the numbers that enter the softmax, where they
            are not found.
        quantile: Let the limit apply to this quantile of the rows' r, not to the largest. What
            passes is then not certified for every row.
        radii: What to log beside the output's radius; see SafeStep.
        run_dir: Directory of ``run.jsonl``; by default the Trainer's ``output_dir``.
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
        guard: The SafeStep while the Trainer trains, else None.
        last: The latest StepReport, None before the first.

    Raises:
        ValueError: If the Trainer hands its steps to DeepSpeed, which makes them out of reach.

    Reference:
        Ghosts of Softmax: Complex Singularities That Limit Safe Step Sizes in Cross-Entropy,
        arXiv:2603.13552, Thm 4.6 and Sec. 6.5.

    Example:
        >>> callback = StepSafetyCallback(radius="certified")
        >>> callback.last is None  # pass it: Trainer(..., callbacks=[callback])
        True
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
        self.guard: SafeStep | None = None
        self.last: StepReport | None = None
        self._logits = logits
        self._run_dir = run_dir
        self._options: dict[str, Any] = {
            "max_normalized_step": max_normalized_step,
            "radius": radius,
            "estimator": estimator,
            "action": action,
            "quantile": quantile,
            "radii": list(radii),
            "max_consecutive_skips": max_consecutive_skips,
            "copy": copy,
            "replica_check_interval": replica_check_interval,
            "audit_interval": audit_interval,
            "sufficient_decrease": sufficient_decrease,
            "rollback": rollback,
            "rollback_after": rollback_after,
            "keep_batches": keep_batches,
        }
        self._has_logits = logits is not None
        self._state: dict[str, Any] | None = None
        self._losses = _Losses()
        self._counts = dict.fromkeys(_COUNTED, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and the optimizer that the Trainer made."""
        self._detach()
        self._check(args)
        model = kwargs["model"]
        run_dir = args.output_dir if self._run_dir is None else self._run_dir
        self.last = None
        self.guard = SafeStep(
            kwargs["optimizer"], model, logits=self._logits, run_dir=run_dir, **self._options
        )
        saved = _saved_state(state) or self._state
        if saved is not None and state.global_step > 0:
            self.guard.load_state_dict(saved)
        self._losses.attach(model)
        _report_first(self)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the loss of the batches that this step was computed from."""
        loss = self._losses.take(args.gradient_accumulation_steps)
        if self.guard is not None and loss is not None:
            self.guard.log(loss=loss)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what the guard did; of a step that a GradScaler left out there is no report."""
        self._losses.forget()
        if self.guard is None or self.guard.last is self.last:
            return
        self.last = self.guard.last
        if self.last is not None and self.last.status in self._counts:
            self._counts[self.last.status] += 1

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add r and what the guard did to the Trainer's logs."""
        logs = kwargs.get("logs")
        if self.guard is None or self.last is None or logs is None or "loss" not in logs:
            return
        values = {
            "safestep/normalized_step": self.last.normalized_step,
            "safestep/radius": self.last.radius,
            "safestep/step_norm": self.last.step_norm,
            "safestep/scale": self.last.scale,
            "safestep/effective_lr": self.last.effective_learning_rate,
            "safestep/gradient_ratio": self.last.gradient_ratio,
            "safestep/divergence": self.last.divergence,
            "safestep/loss_slope": self.last.loss_slope,
            "safestep/predicted_change": self.last.predicted_change,
        }
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        values |= {f"safestep/{status}": count for status, count in self._counts.items()}
        self._counts = dict.fromkeys(_COUNTED, 0)
        logs.update(values)
        state.log_history[-1].update(values)  # the Trainer's own copy of `logs`

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove every hook."""
        self._detach()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into a checkpoint: the options and the guard's state."""
        guard_state = self._state if self.guard is None else self.guard.state_dict()
        run_dir = None if self._run_dir is None else str(self._run_dir)
        return {
            "args": self._options | {"run_dir": run_dir},
            "attributes": {"_state": guard_state, "_has_logits": self._has_logits},
        }

    def _check(self, args: TrainingArguments) -> None:
        """Refuse what the guard would get wrong.

        Raises:
            ValueError: If DeepSpeed makes the steps, or `logits` did not survive a restored state.
        """
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise ValueError(
                "StepSafetyCallback: expected a torch optimizer, got a Trainer that hands its "
                "steps to DeepSpeed, which updates partitions that no hook sees. Use DDP or FSDP2 "
                "(`accelerate config`), or leave the callback out."
            )
        if self._has_logits and self._logits is None:
            raise ValueError(
                "StepSafetyCallback: expected `logits` again, got a callback that the Trainer made "
                "from a checkpoint, which holds no functions. Leave "
                "`restore_callback_states_from_checkpoint` out: the guard's state is restored "
                "without it."
            )

    def _detach(self) -> None:
        if self.guard is not None:
            self._state = self.guard.state_dict()
            self.guard.detach()
        self._losses.detach()
        self.guard = None


_COUNTED = ("clipped", "skipped", "unmeasured")


class _Losses:
    """Collect the losses that a model returns between two optimizer steps."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._are_parts = False
        self._handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Watch the training forward passes of `model`."""
        self._found = []
        self._handle = model.register_forward_hook(self._look, with_kwargs=True)

    def take(self, batches: int) -> Tensor | None:
        """Return the loss of one optimizer step, None where the model returned none."""
        found, self._found = self._found, []
        if not found:
            return None
        total = torch.stack([loss.float() for loss in found]).sum()
        return total if self._are_parts else total / min(batches, len(found))

    def forget(self) -> None:
        """Forget losses of the guard's own runs, which happen within the optimizer step."""
        self._found = []

    def detach(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _look(self, _: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():  # an evaluation
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            self._found.append(loss.detach().reshape(()))
            # Divided by the labels of all batches of the step, the parts add up to the mean.
            self._are_parts = kwargs.get("num_items_in_batch") is not None


def _saved_state(state: TrainerState) -> dict[str, Any] | None:
    """Return the guard's state in the checkpoint that the Trainer resumed from."""
    saved = state.stateful_callbacks
    found = saved.get(StepSafetyCallback.__name__) if isinstance(saved, dict) else None
    return found["attributes"]["_state"] if isinstance(found, dict) else None


def _report_first(callback: TrainerCallback) -> None:
    """Put a callback before those that report to trackers, so that these see what it logs.

    The Trainer puts its own first and tells a callback nothing of the list that it is in: the list
    is found through the call that is under way.
    """
    frame = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is None:
        return
    handler = frame.f_locals["self"]
    others = [each for each in handler.callbacks if each is not callback]
    handler.callbacks = [callback, *others]  # a new list: the old one is being walked through
