"""Watch every step of an optimizer; scale or undo it where it is too long."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from safestep.capture import LogitsFn
from safestep.capture.recorder import Recorder
from safestep.guard.agreement import Agreement
from safestep.guard.attach import (
    hooked_optimizer,
    is_within_backward,
    steps_under_way,
    why_no_calls,
)
from safestep.guard.controller import StepController
from safestep.guard.gradient_watch import GradientWatch
from safestep.guard.health import Health, where_not_finite
from safestep.guard.journal import Journal
from safestep.guard.kept_batches import KeptBatches
from safestep.guard.known_losses import KnownLosses
from safestep.guard.lookahead import Lookahead
from safestep.guard.options import Action, check_arguments, check_past
from safestep.guard.predictor import Measure, Predicted, Predictor, direction_options
from safestep.guard.rank_messages import RuledOut
from safestep.guard.retries import Retries
from safestep.guard.rollback import Rollback
from safestep.guard.second_run import SecondRun
from safestep.guard.snapshot import Snapshot
from safestep.guard.step_lifecycle import StepLifecycle, own_failure
from safestep.guard.step_report import StepReport
from safestep.guard.undo import Undo, carry_out
from safestep.guard.unmeasured import KnownUnmeasured
from safestep.measure.cross_check import CheckedEstimator
from safestep.measure.estimator_registry import EstimatorOption
from safestep.measure.inner_radii import RadiusName, inner_watch
from safestep.measure.part_of_batch import PartOfBatch
from safestep.measure.radii_of_step import radii_of_step
from safestep.measure.update import Estimator, Finding, Measurement, Update
from safestep.parallel.ranks import Ranks
from safestep.radius.bounds import RungOption


class SafeStep(StepLifecycle):
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
            limit), or a "secant" where that will do, or a part of the batch ("sampled 2/16") where
            its examples are seen to be independent; the others are reported as "predicted".
            "difference" and "secant" run them twice instead; "difference" also takes over from
            "jvp" where a model has no forward-mode derivative. Their scope:
            ``safestep.measure.estimators``; of "auto", ``safestep.guard.predictor``.
        action: "clip" scales down a step with r over the limit; "set" scales every step to
            r = the limit, up or down; "monitor" only measures.
        logits: A function from the model's output to the numbers that enter the softmax, where
            they are not the output itself: ``logits=lambda output: output / temperature``.
        quantile: Apply the limit to this quantile of the rows' r, which certifies not every row.
        radii: Radii to log beside the output's, of which none decides: "attention", of the softmax
            over attention scores, and "ffn", the distance at which ReLU-like units switch. With
            them "auto" measures every step exactly. See ``safestep.measure.inner_radii``.
        sufficient_decrease: c in [0, 1) leaves a step over the limit alone if its linearised loss
            falls by c times what its slope promises, unless one of the 16 before was shortened
            because it did not. None shortens all. See ``safestep.guard.decrease``.
        run_dir: Directory for ``run.jsonl``, the input of ``safestep report``. None writes none.
        process_group: The workers that must take the same step; by default all that there are.
        max_consecutive_skips: Skipped steps in a row at which ``step()`` raises RuntimeError.
        part: The submodule whose forward calls are recorded and run again; by default `model`.
        copy: Whether parameters and optimizer state are copied while the optimizer steps. False
            computes the update just before the step, which is then scaled by its learning rate or
            does not happen: for SGD, Adam, AdamW and Muon of torch, whose gradients must be final
            when they step (or when the closure returns). See ``safestep.guard.lookahead``.
        replica_check_interval: Compare checksums of parameters and optimizer state every so many
            steps, over the ranks that hold the same ones, and name a rank that differs; None
            compares the norms of their updates alone.
        audit_interval: Measure at least one in so many steps exactly, to audit the gradient there;
            None adds none. See ``safestep.guard.gradient_watch``.
        rollback: Keep the run as it was before each of the last so many steps, for `roll_back`:
            parameters, buffers, optimizer state and guard. Each is a copy in memory (12 bytes a
            parameter for AdamW in float32); the log says how much that is in all.
        rollback_after: Call `roll_back` after so many skipped or clipped steps in a row.
        keep_batches: Write the inputs of clipped and skipped steps into at most so many files in
            `run_dir`, on each rank. See ``safestep.guard.kept_batches``.

    Attributes:
        last: The StepReport of the latest step, None before the first.
        last_radii: What `radii` asked for, of the latest step: see
            ``safestep.measure.radii_of_step``.
        enabled: False leaves steps alone without measuring them, as in a learning-rate search.

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
        radius: RungOption = "bound",
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
        audit_interval: int | None = None,
        sufficient_decrease: float | None = None,
        rollback: int | None = None,
        rollback_after: int | None = None,
        keep_batches: int = 0,
    ) -> None:
        optimizer = hooked_optimizer(optimizer)
        check_arguments(model, estimator, logits, max_consecutive_skips)
        check_past(rollback, rollback_after, keep_batches, run_dir)
        controller = StepController(
            max_normalized_step, radius, action, quantile, max_consecutive_skips,
            sufficient_decrease,
        )  # fmt: skip
        undo: Undo = Snapshot(optimizer) if copy else Lookahead(optimizer)
        # "set" needs the exact r at every step, and so do radii inside the model.
        is_sparing = estimator == "auto" and action != "set" and set(radii) <= {"output"}
        recorder = Recorder(model, self._trained, part=part, watches=is_sparing)
        super().__init__(optimizer, undo, controller, recorder, is_ahead=not copy)
        self.last_radii: dict[str, Any] = {}
        given = {name: "given" for name, v in (("logits", logits), ("part", part)) if v is not None}
        self._settings: dict[str, Any] = {
            "optimizer": type(self.optimizer).__name__, "keep_batches": keep_batches,
            "parameters": sum(param.numel() for param in self._trained()),
            "max_normalized_step": max_normalized_step, "radius": radius, "estimator": estimator,
            "action": action, "quantile": quantile, "radii": sorted(radii), "copy": copy,
            "max_consecutive_skips": max_consecutive_skips, "audit_interval": audit_interval,
            "replica_check_interval": replica_check_interval, "rollback": rollback,
            "sufficient_decrease": sufficient_decrease, "rollback_after": rollback_after, **given,
        }  # fmt: skip
        self._journal = Journal(run_dir, self._settings, process_group, owners=model.parameters())
        ranks = Ranks(self._trained(), process_group, model)
        state = self.state_dict, self.load_state_dict
        ranks.share(*state)
        tell = self._journal.tell_drift
        self._agreement = Agreement(optimizer, ranks, tell, replica_check_interval)
        limits = max_normalized_step, controller.passes_long_steps
        self._predictor = Predictor(*limits) if is_sparing else None
        self._losses = KnownLosses()
        module = recorder.module
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        inside = self._inside = inner_watch(module, radii)
        first = Estimator.JVP if estimator == "auto" else Estimator(estimator)
        sampler, own = PartOfBatch() if is_sparing else None, self._agreement.own_gradients
        rule = controller.rule
        self._estimator = CheckedEstimator(module, rule, ranks, first, logits, inside, sampler, own)
        self._retries = Retries()
        again = self._agreement.averaged(self._estimator.second_gradient)
        self._audit = GradientWatch(audit_interval, self._journal.tell_gradient, self._names, again)
        parts = {"predictor": self._predictor, "losses": self._losses, "part_of_batch": sampler}
        self._parts = {"gradient": self._audit, **(parts if is_sparing else {})}
        kept = KeptBatches(run_dir, keep_batches, ranks)
        self._second_run = SecondRun(module, ranks, self._journal, kept)
        self._rollback = Rollback(optimizer, module, rollback, rollback_after, state, ranks)
        can_rest = rollback is None and inside is None and self._agreement.is_alone
        self._unmeasured = KnownUnmeasured(optimizer, recorder, self._retries, is_possible=can_rest)
        self._handles = self._attach()

    def log(self, **values: Any) -> None:
        """Write `values` into the next step's record of the run log, such as ``loss=loss``.

        Args:
            **values: Numbers, tensors of one element or texts, by the name they get in the log.

        Raises:
            ValueError: If a name is one of the record's own, such as ``step``, or a value cannot
                be written.
        """
        self._journal.log(values)

    def roll_back(self) -> StepReport:
        """Return the run to `rollback` steps ago, or to the first step that is kept.

        Call it between two steps, on every rank. The next steps, which count from then on, are
        those of a run resumed from a checkpoint of then. Data, random state and a learning-rate
        scheduler go on, unless the loop puts them back too.

        Returns:
            The new ``last``: of status "rolled back", with the step in its reason.

        Raises:
            RuntimeError: If `rollback` is None, a step is under way or none is kept.
        """
        is_within = steps_under_way(self.optimizer) > 0
        self.last = report = self._rollback.on_call(self.last, is_within=is_within)
        self.forget()
        self._journal.tell_rollback(report)
        return report

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
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        parts |= {**self._rollback.state_dict(), "run": self._journal.run}
        return self._controller.state_dict() | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._journal.resume(state.get("run"))
        self._controller.load_state_dict(state)
        self._rollback.load_state_dict(state)
        for name in self._parts.keys() & state.keys():
            self._parts[name].load_state_dict(state[name])

    def _judged_step(self) -> tuple[StepReport, Measurement]:
        update, health = self._seen()
        measurement = self._foresee(update, health)
        if isinstance(measurement, Measure):
            measurement = self._measure(update, health, measurement)
        measurement = self._audit.audited(self._controller.step, measurement, update, health)
        report = self._controller.decide(measurement, self._lr)
        report = self._second_run.explain(report, measurement, update)
        report = carry_out(report, self._undo)
        self._note_radii(measurement, report.step_norm)
        return report, measurement

    def _step_known_unmeasured(self) -> tuple[StepReport, Measurement] | None:
        if (reason := self._unmeasured.reason()) is None:
            return None
        self._losses.learn(self._recorder.take(), is_measured=False)
        unmeasured = Measurement.failed(reason, self._estimator.estimator)
        return self._controller.decide(unmeasured, self._lr), unmeasured

    def _begin(self) -> None:
        self._agreement.begin_step(self._controller.step, self._settings, self._names)
        if (size := self._rollback.begin()) is not None:
            self._journal.tell("rollback", size, self._controller.step)

    def _end(self, report: StepReport | None) -> None:
        report = self._rollback.after(report)
        self._agreement.end_step()
        self._may_be_spared = self._unmeasured.end_step()
        self._recorder.keep_gradients(all_of_them=self._audit.is_due(self._controller.step))
        if report is not None:
            self.last = report
            self._journal.publish(report)

    def _seen(self) -> tuple[Update, Health]:
        """Return the update and its sizes, or `_NO_UPDATE` where something of ours failed."""
        calls = self._recorder.take()
        self._obstacle = self._obstacle or self._recorder.failures.take()
        if self._is_blind:
            return _NO_UPDATE, Health(nan, nan)
        try:
            update = self._undo.update([] if is_within_backward() else calls)
            watches, prints = self._predictor is not None, self._agreement.has_replicas
            return update, Health.of(update, watches=watches, prints=prints)
        except Exception as error:
            self._surroundings.restore(error)
            self._obstacle = own_failure(error)
            return _NO_UPDATE, Health(nan, nan)

    def _foresee(self, update: Update, health: Health) -> Measurement | Measure:
        """Return what the last measurements tell about this update, or how to measure it."""
        if self._predictor is None or self._agreement.is_idle:
            return Measure.EXACTLY
        options = direction_options(self.optimizer.param_groups, len(update.params))
        is_new = not (update.calls and self._losses.include(update.calls))
        is_due = self._audit.is_due(self._controller.step)
        ruled_out = RuledOut(
            prediction=is_new or is_due or self._obstacle is not None,
            secant=not self._estimator.trusts_secants,
            sampling=not self._estimator.can_sample(update),
        )
        trail, are_parts = self._predictor.trail(options), update.is_sharded
        health, ruled_out = self._agreement.sizes(health, ruled_out, trail, are_parts=are_parts)
        signals, can_sample = (health.gradient_norm, *health.signals), not ruled_out.sampling
        answer = self._predictor.predict(
            health.step_norm, signals, options,
            can_sample=can_sample, is_held=self._controller.is_held,
        )  # fmt: skip
        if ruled_out.prediction or (answer is Measure.QUICKLY and ruled_out.secant):
            return Measure.EXACTLY
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
        state = self._audit.fingerprint(health, measurement)
        measurement = self._agreement.measurement(measurement, health.fingerprint, state)
        if self._predictor is None:
            return measurement
        is_exact, is_measured = how is Measure.EXACTLY, measurement.finding is Finding.MEASURED
        severity = self._controller.severity(measurement)
        if not (is_exact or (is_measured and self._predictor.suffices(severity, how))):
            return self._measure(update, health, Measure.EXACTLY)
        self._losses.learn(update.calls, is_measured=is_measured)
        if is_measured:
            distance, r = measurement.step_norm, measurement.normalized_step
            self._predictor.learn(distance, r, severity, is_exact=is_exact)
        return measurement

    def _measured_here(self, update: Update, health: Health, how: Measure) -> Measurement:
        """Return what this worker measured; an obstacle is in the reason."""
        quick, is_lost = _QUICK.get(how), False
        # Of a secant too: whether it suffices is a question that all workers answer alike.
        measurement = Measurement(quick or self._estimator.estimator)
        reason = self._obstacle or (None if update.calls else why_no_calls(*self._recorder.seen))
        # Ranks that share parameters must try at the same steps, whatever their data show.
        looks = [] if update.is_sharded else update.calls
        reason = self._agreement.obstacle(reason, is_due=not self._retries.is_pausing)
        if reason is None:
            measure = partial(self._estimator.measure, update, quick)
            try:
                found = self._retries.attempt(looks, measure, counts=quick is None)
                measurement, reason = found or measurement, self._retries.reason
            except Exception as error:  # training goes on; the report and a warning say why
                reason, is_lost = self._agreement.failure(error)
        if update is _NO_UPDATE:
            return replace(measurement, finding=Finding.UNMEASURED, reason=reason)
        finding = health.finding(measurement.radius, reason)
        if finding.forbids_step:
            reason = where_not_finite(finding, update, self._names)
        return replace(
            measurement, finding=finding, reason=reason or measurement.reason,
            step_norm=health.step_norm, is_partial=update.is_sharded, is_lost=is_lost,
            bottleneck=measurement.bottleneck if finding is Finding.MEASURED else -1,
        )  # fmt: skip

    def _note_radii(self, measurement: Measurement, step_norm: float) -> None:
        if self._inside is not None:
            self.last_radii = radii_of_step(self._inside, measurement, step_norm)
            self._journal.note_radii(self.last_radii)

    def _trained(self) -> list[Tensor]:
        return [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad]


_NO_UPDATE = Update([], [], [], [])
_QUICK = {Measure.QUICKLY: Estimator.SECANT, Measure.ROUGHLY: Estimator.SAMPLED}
