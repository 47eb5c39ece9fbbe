"""Watch every step of an optimizer; scale or undo it where it is too long."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from math import nan
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from safestep.capture import LogitsFn
from safestep.capture.recorder import Recorder
from safestep.guard.agreement import Agreement
from safestep.guard.attach import (
    check_optimizer,
    hook_steps,
    hooked_optimizer,
    is_within_backward,
    is_within_step,
)
from safestep.guard.controller import StepController, StepReport
from safestep.guard.health import Health, where_not_finite
from safestep.guard.journal import Journal
from safestep.guard.lookahead import Lookahead
from safestep.guard.options import (
    Action,
    EstimatorOption,
    check_arguments,
)
from safestep.guard.predictor import Measure, Predicted, Predictor, direction_options
from safestep.guard.snapshot import Snapshot
from safestep.guard.undo import Undo
from safestep.measure.binding_radius import radii_of_step
from safestep.measure.cross_check import CheckedEstimator
from safestep.measure.inner_radii import RadiusName, inner_watch
from safestep.measure.update import Estimator, Finding, Measurement, Update
from safestep.parallel.ranks import Ranks
from safestep.radius.batch import Rung


class SafeStep:
    """Keep every step of an optimizer within the softmax convergence radius.

    It hooks into ``optimizer.step()``, measures r = step distance / radius along the update that
    the optimizer made, and scales the update if r is over the limit. It undoes a step that is not
    finite, optimizer state included. A step it leaves alone is bitwise the optimizer's own.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, a wrapper with the real one in ``.optimizer``, or
            an object with ``param_groups``, ``state`` and ``step``. Several optimizers on one model
            get a SafeStep each: the sum of their r bounds the r of their joint step.
        model: The module whose forward pass computes the logits (``DistributedDataParallel`` and
            ``torch.compile`` wrappers included).
        max_normalized_step: Largest r that is let through. 1.0 is the radius itself.
        radius: "bound" is pi / spread; "certified" is larger and still proven.
        estimator: "jvp" runs the recorded forward calls again in forward-mode automatic
            differentiation: exact, at every step. "auto" does so only where the last measurements
            cannot vouch for a step (the first 16, at least one in 320, what is unusual or near the
            limit), or a "secant" where that will do; the others are reported as "predicted".
            "difference" and "secant" run them twice instead; "difference" also takes over from
            "jvp" where a model has no forward-mode derivative. Their scope:
            ``safestep.measure.estimators``; of "auto", ``safestep.guard.predictor``.
        action: "clip" scales down a step with r over the limit; "set" scales every step to
            r = the limit, up or down; "monitor" only measures.
        logits: A function from the model's output to the numbers that enter the softmax, where
            they are not the output itself: ``logits=lambda output: output / temperature``.
        quantile: Apply the limit to this quantile of the rows' r in place of the largest. A step
            that passes is then not certified for every row.
        radii: Radii to log beside the output's: "attention", of the softmax over attention scores,
            and "ffn", the distance at which ReLU-like units switch, by layer, with the name of the
            smallest. The decision rests on the output's alone. They need an exact measurement, so
            "auto" measures every step. See ``safestep.measure.inner_radii``.
        run_dir: Directory for ``run.jsonl``, the input of ``safestep report``. None writes none.
        process_group: The workers that must take the same step; by default all of them, if
            ``torch.distributed`` is initialized.
        max_consecutive_skips: Number of consecutive skipped steps after which ``step()`` raises
            RuntimeError.
        part: The submodule whose forward calls are recorded and run again; by default `model`
            itself. A re-run leaves no trace on any part of `model`.
        copy: Whether parameters and optimizer state are copied while the optimizer steps. False
            needs no copy: the update is computed just before the step, which is then scaled by its
            learning rate or does not happen. For SGD, Adam, AdamW and Muon of torch, whose
            gradients must be final when they step (or when the closure returns). See
            ``safestep.guard.lookahead``.
        replica_check_interval: Compare checksums of parameters and optimizer state over the ranks
            at one in so many steps; None compares the update norms alone, at every step for free.
            A replica that differs is named in a warning and an event of the log.

    Attributes:
        last: The StepReport of the latest step, None before the first.
        last_radii: What `radii` asked for, of the latest step: see
            ``safestep.measure.binding_radius``.
        enabled: False leaves steps alone without measuring them, for instance in a search for a
            learning rate.

    Raises:
        TypeError: If `optimizer` is not a torch.optim.Optimizer or `model` is not an nn.Module.
        ValueError: If an option has a value that is not listed here, the optimizer already has a
            SafeStep, or `copy` is False and the optimizer is not one of those listed.

    Reference:
        Ghosts of Softmax: Complex Singularities That Limit Safe Step Sizes in Cross-Entropy,
        arXiv:2603.13552, Thm 4.6 and Sec. 6.5.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1000.0)
        >>> guard = SafeStep(optimizer, model)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2]))
        >>> loss.backward()
        >>> optimizer.step()
        >>> guard.last.status, guard.last.scale < 0.01
        ('clipped', True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        max_normalized_step: float = 1.0,
        radius: Rung = "bound",
        estimator: EstimatorOption = "auto",
        action: Action = "clip",
        logits: LogitsFn | None = None,
        quantile: float | None = None,
        radii: Collection[RadiusName] = ("output",),
        run_dir: str | Path | None = None,
        process_group: ProcessGroup | None = None,
        max_consecutive_skips: int = 25,
        part: nn.Module | None = None,
        copy: bool = True,
        replica_check_interval: int | None = None,
    ) -> None:
        self.optimizer = hooked_optimizer(optimizer)
        check_optimizer(self.optimizer)
        check_arguments(model, estimator, logits, max_consecutive_skips)
        self.last: StepReport | None = None
        self.last_radii: dict[str, Any] = {}
        self.enabled = True
        self._controller = StepController(
            max_normalized_step, radius, action, quantile, max_consecutive_skips
        )
        self._is_ahead = not copy
        self._undo: Undo = Snapshot(self.optimizer) if copy else Lookahead(self.optimizer)
        self._verdict: tuple[StepReport, Measurement] | None = None
        self._seconds: float | None = None  # None: no step is under way
        self._inner_steps = 0  # under way within it: a subclass may call super().step()
        given = {name: "given" for name, v in (("logits", logits), ("part", part)) if v is not None}
        self._settings: dict[str, Any] = {
            "optimizer": type(self.optimizer).__name__,
            "parameters": sum(param.numel() for param in self._trained()),
            "max_normalized_step": max_normalized_step, "radius": radius, "estimator": estimator,
            "action": action, "quantile": quantile, "radii": sorted(radii), "copy": copy,
            "max_consecutive_skips": max_consecutive_skips,
            "replica_check_interval": replica_check_interval, **given,
        }  # fmt: skip
        self._journal = Journal(run_dir, self._settings, process_group, owners=model.parameters())
        ranks = Ranks(self._trained(), process_group, model)
        ranks.share(self.state_dict, self.load_state_dict)
        self._agreement = Agreement(
            self.optimizer, ranks, self._journal.tell_drift, replica_check_interval
        )
        # "set" needs the exact r at every step, and so do radii inside the model.
        is_sparing = estimator == "auto" and action != "set" and set(radii) <= {"output"}
        self._predictor = Predictor(max_normalized_step) if is_sparing else None
        self._recorder = Recorder(model, self._trained, part=part, watches=is_sparing)
        module = self._recorder.module
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        self._inside = inner_watch(module, radii)
        first = Estimator.JVP if estimator == "auto" else Estimator(estimator)
        self._estimator = CheckedEstimator(
            module, self._controller.rule, first, logits, self._inside
        )
        self._handles = hook_steps(self.optimizer, self._before_step, self._after_step)

    def log(self, **values: Any) -> None:
        """Write `values` into the next step's record of the run log, such as ``loss=loss``.

        Args:
            **values: Numbers, tensors of one element or texts, by the name they get in the log.

        Raises:
            ValueError: If a name is one of the record's own, such as ``step``, or a value cannot
                be written.
        """
        self._journal.log(values)

    def record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Tell which call the next update is computed from, just before it happens.

        For training steps that are more than a forward call of the model: `function` is run again
        to measure, and the logits are what it hands to its loss function. Once told, the guard no
        longer looks at forward calls of the model.

        So the logits may be another model's output, as those of a GAN's generator are: `function`
        then returns ``loss(discriminator(generator(noise)))``, and `model` is what holds both.

        Args:
            function: What is called, for instance ``training_step``; it returns the loss.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.
        """
        self._recorder.record(function, *args, **kwargs)

    def forget(self) -> None:
        """Void the calls recorded since the last step: the step they were for never came.

        GradScaler leaves a step out where a gradient is infinite. Forward calls of the model that
        the guard finds by itself are then void anyway; those it was told of with `record` are not.
        """
        self._recorder.take()

    def detach(self) -> None:
        """Remove every hook; the optimizer and the model are then as they were before."""
        for handle in self._handles:
            handle.remove()
        self._recorder.detach()
        self._agreement.ranks.detach()
        self._undo.release()
        self._journal.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers."""
        state = {**self._controller.state_dict(), "run": self._journal.run}
        if self._predictor is not None:
            state["predictor"] = self._predictor.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._journal.resume(state.get("run"))
        self._controller.load_state_dict(state)
        if self._predictor is not None and "predictor" in state:
            self._predictor.load_state_dict(state["predictor"])

    def __enter__(self) -> SafeStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __reduce__(self) -> str:
        raise TypeError(
            "SafeStep: expected not to be copied or pickled, since its hooks belong to one "
            "optimizer. Save guard.state_dict() and attach a new SafeStep."
        )

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._seconds is not None:
            if is_within_step(self.optimizer):
                self._inner_steps += 1
                return None
            self._undo.release()  # of a step that raised
        self._seconds, self._inner_steps, self._verdict = None, 0, None
        if not self.enabled:
            self._agreement.end_step()
            self._recorder.take()  # the calls of this step
            return None
        begin = perf_counter()
        self._recorder.notice_effects()
        self._agreement.begin_step(self._controller.step, self._settings, self._names)
        self._undo.take()
        has_closure = any(map(callable, (*args, *kwargs.values())))
        if has_closure:  # forward calls in the step, and the gradients
            self._recorder.begin_step()
        elif self._is_ahead:
            self._judge()
        self._seconds = perf_counter() - begin
        if not (has_closure and self._is_ahead):
            return None
        return tuple(map(self._judged, args)), {k: self._judged(v) for k, v in kwargs.items()}

    def _judged(self, argument: Any) -> Any:
        """Return a closure after which the step is judged, before the optimizer makes it."""
        if not callable(argument):
            return argument

        def closure() -> Any:
            loss = argument()
            begin = perf_counter()
            self._judge()
            self._seconds = (self._seconds or 0.0) + perf_counter() - begin
            return loss

        return closure

    def _after_step(self, *_: Any) -> None:
        if self._seconds is None:
            return
        if self._inner_steps:
            self._inner_steps -= 1
            return
        begin = perf_counter() - self._seconds
        self._seconds = None
        if not self._is_ahead:
            self._judge()
        assert self._verdict is not None
        report, measurement = self._verdict
        self._undo.release()
        self._agreement.end_step()
        self._note_radii(measurement, report.step_norm)
        self.last = replace(report, seconds=perf_counter() - begin)
        self._journal.publish(self.last)
        self._controller.give_up_if_stuck(self.last)

    @torch.no_grad()
    def _judge(self) -> None:
        """Measure the update, made or still to come, and scale it or keep it from counting."""
        calls = self._recorder.take()
        update = self._undo.update([] if is_within_backward() else calls)
        health = Health.of(
            update, watches=self._predictor is not None, prints=self._agreement.has_replicas
        )
        measurement = self._foresee(update, health)
        if isinstance(measurement, Measure):
            measurement = self._measure(update, health, measurement)
        lr = float(self.optimizer.param_groups[0].get("lr", nan))
        report = self._controller.decide(measurement, lr)
        if report.status == "skipped":
            self._undo.restore()
        elif report.scale != 1.0:
            self._undo.rescale(report.scale)
        self._verdict = report, measurement

    def _foresee(self, update: Update, health: Health) -> Measurement | Measure:
        """Return what the last measurements tell about this update, or how to measure it."""
        if self._predictor is None:
            return Measure.EXACTLY
        health = self._agreement.health(health, are_parts=update.is_sharded)
        signals = (health.gradient_norm, *health.signals)
        options = direction_options(self.optimizer.param_groups, len(update.params))
        answer = self._predictor.predict(health.step_norm, signals, options)
        is_untrusted = answer is Measure.QUICKLY and not self._estimator.trusts_secants
        if not update.calls or is_untrusted:
            answer = Measure.EXACTLY
        answer = self._agreement.answer(answer)
        if isinstance(answer, Predicted):
            return Measurement.predicted(answer.normalized_step, health.step_norm)
        return answer

    def _measure(self, update: Update, health: Health, how: Measure) -> Measurement:
        """Return what all workers measured of an update, and let the predictor learn from it."""
        measurement = self._measured_here(update, health, how)
        self._journal.introduce(self._estimator.finder.description, self._controller.step)
        if measurement.warning is not None:
            self._journal.warn_once(measurement.warning)
        if measurement.head is not None:
            self._journal.note({"head": measurement.head})
        measurement = self._agreement.measurement(measurement, health.fingerprint)
        if self._predictor is None:
            return measurement
        is_measured = measurement.finding is Finding.MEASURED
        r = measurement.normalized_step
        is_secant = measurement.estimator is Estimator.SECANT
        if is_secant and not (is_measured and self._predictor.is_far(r)):
            return self._measure(update, health, Measure.EXACTLY)
        if is_measured:
            self._predictor.learn(measurement.step_norm, r, is_secant=is_secant)
        return measurement

    def _measured_here(self, update: Update, health: Health, how: Measure) -> Measurement:
        """Return what this worker measured; an obstacle is in the reason."""
        is_quick, reason = how is Measure.QUICKLY, None
        # Of a secant too: whether it suffices is a question that all workers answer alike.
        measurement = Measurement(Estimator.SECANT if is_quick else self._estimator.estimator)
        if update.calls:
            try:
                measurement = self._estimator.measure(update, is_quick=is_quick)
            except Exception as error:  # training goes on; the report and a warning say why
                reason = _one_line(error)
        else:
            reason = _IN_BACKWARD if is_within_backward() else _NO_CALLS
        finding = health.finding(measurement.radius, reason)
        if finding.forbids_step:
            reason = where_not_finite(finding, update, self._names)
        return replace(
            measurement, finding=finding, reason=reason, step_norm=health.step_norm,
            is_partial=update.is_sharded,
            bottleneck=measurement.bottleneck if finding is Finding.MEASURED else -1,
        )  # fmt: skip

    def _note_radii(self, measurement: Measurement, step_norm: float) -> None:
        if self._inside is None:
            return
        self.last_radii = radii_of_step(self._inside, measurement, step_norm)
        self._journal.note(self.last_radii)
        for kind, reason in self.last_radii.get("radii_reason", {}).items():
            self._journal.warn_once(f"the {kind} radius is not measured: {reason}")

    def _trained(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]


_NO_CALLS = (
    "no gradient came back through a forward call of `model` since the last step; pass the module "
    "whose forward computes the logits, or tell the guard the whole step with "
    "guard.record(training_step, batch)"
)

_IN_BACKWARD = (
    "the optimizer steps within the backward pass, where the step of the other parameters is not "
    "known yet; step after backward() to measure the radius"
)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, RuntimeError) else f"{type(error).__name__}: {text}"
