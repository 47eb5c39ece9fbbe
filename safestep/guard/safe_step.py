"""Watch every step of a torch optimizer and scale or undo it where it is too long."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from math import nan
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from safestep.capture import LogitsFn
from safestep.capture.hooks import DetachableHook
from safestep.capture.recorder import Recorder
from safestep.guard.agreement import agree
from safestep.guard.attach import hooked_optimizer, is_within_step
from safestep.guard.controller import Action, Measurement, Rung, StepController, StepReport
from safestep.guard.journal import Journal
from safestep.guard.lookahead import Lookahead
from safestep.guard.meter import Meter
from safestep.guard.predictor import Predictor
from safestep.guard.snapshot import Snapshot
from safestep.measure.binding_radius import radii_of_step
from safestep.measure.cross_check import Reading
from safestep.measure.inner_radii import RadiusName, inner_watch
from safestep.parallel.collectives import apart_from_shards, gathered, world_size


class SafeStep:
    """Keep every step of an optimizer within the softmax convergence radius.

    It hooks into ``optimizer.step()``, measures r = step distance / radius along the update that
    was really made, and scales the update if r is over the limit. A step that is not finite is
    undone, optimizer state included. While it does not intervene, it writes nothing: training is
    what it would have been, bit for bit.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, or a wrapper with the real one in ``.optimizer``.
            Several optimizers on one model get a SafeStep each: the sum of their r bounds the r
            of their joint step.
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
        logits: How to get from the model's output to the numbers that enter the softmax, where they
            are not the output itself: ``logits=lambda output: output / temperature``.
        quantile: Let the limit apply to this quantile of the rows' r, not to the largest. What
            passes is then not certified for every row.
        radii: What to log beside the output's radius, on which alone the decision rests:
            "attention", of the softmax over attention scores, and "ffn", where ReLU-like units
            switch; by layer, and which binds. See ``safestep.measure.inner_radii``. Only "jvp"
            measures it, and "auto", which then measures every step.
        run_dir: Directory for ``run.jsonl``, the input of ``safestep report``. None writes none.
        process_group: The workers that must take the same step; by default all of them, if
            ``torch.distributed`` is initialized.
        max_consecutive_skips: So many steps in a row may be undone before an error ends the run.
        part: The submodule whose forward calls are recorded and run again, by default all of
            `model`. All of `model` is left without a trace of it either way.
        copy: Whether parameters and optimizer state are copied while the optimizer steps. False
            needs no copy: the update is computed just before the step, which is then scaled by its
            learning rate or does not happen. For SGD, Adam, AdamW and Muon of torch, whose
            gradients must be final when they step (or when the closure returns). See
            ``safestep.guard.lookahead``.

    Attributes:
        last: The StepReport of the latest step, None before the first.
        last_radii: What `radii` asked for, of the latest step: see
            ``safestep.measure.binding_radius``.
        enabled: False lets steps pass unseen, as in a search for a learning rate.

    Raises:
        TypeError: If `optimizer` or `model` is none.
        ValueError: If an option has a value that is not listed here, another SafeStep is already
            attached to this optimizer, or `copy` is False and the optimizer is another one.

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
        estimator: Literal["auto", "jvp", "secant", "difference"] = "auto",
        action: Action = "clip",
        logits: LogitsFn | None = None,
        quantile: float | None = None,
        radii: Collection[RadiusName] = ("output",),
        run_dir: str | Path | None = None,
        process_group: ProcessGroup | None = None,
        max_consecutive_skips: int = 25,
        part: nn.Module | None = None,
        copy: bool = True,
    ) -> None:
        self.optimizer = hooked_optimizer(optimizer)
        _check_arguments(self.optimizer, model, estimator, logits, max_consecutive_skips)
        self.last: StepReport | None = None
        self.last_radii: dict[str, Any] = {}
        self.enabled = True
        self._controller = StepController(max_normalized_step, radius, action, quantile)
        self._estimator = estimator
        self._group = apart_from_shards(self._trained(), process_group)
        self._max_consecutive_skips = max_consecutive_skips
        self._is_ahead = not copy
        self._change = Snapshot(self.optimizer) if copy else Lookahead(self.optimizer)
        self._verdict: tuple[StepReport, Reading] | None = None
        self._seconds: float | None = None  # None: no step is under way
        self._inner_steps = 0  # under way within it: a subclass may call super().step()
        self._journal = Journal(run_dir, {**self._settings(), "radii": list(radii)}, process_group)
        # "set" needs the exact r at every step, and so do radii inside the model.
        is_sparing = estimator == "auto" and action != "set" and set(radii) <= {"output"}
        self._predictor = Predictor(max_normalized_step) if is_sparing else None
        self._recorder = Recorder(model, self._trained, part=part, watches=is_sparing)
        module = self._recorder.module
        names: dict[Tensor, str] = {param: name for name, param in module.named_parameters()}
        self._inside = inner_watch(module, radii)
        self._meter = Meter(
            module, names, self._controller,
            "jvp" if estimator == "auto" else estimator, self._predictor, logits, self._inside,
        )  # fmt: skip
        self._handles = (
            self.optimizer.register_step_pre_hook(_StepHook(self._before_step)),
            self.optimizer.register_step_post_hook(_StepHook(self._after_step)),
        )

    def log(self, **values: Any) -> None:
        """Write `values` into the next step's record of the run log, such as ``loss=loss``.

        Args:
            **values: Numbers or tensors of one element, by the name they get in the log.
        """
        self._journal.note(values)

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
        self._change.release()
        self._journal.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers."""
        state = self._controller.state_dict()
        if self._predictor is not None:
            state["predictor"] = self._predictor.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
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
            self._change.release()  # of a step that raised
        self._seconds, self._inner_steps, self._verdict = None, 0, None
        if not self.enabled:
            return None
        begin = perf_counter()
        self._change.take()
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
        report, reading = self._verdict
        self._change.release()
        self._note_radii(reading, report.step_norm)
        # Nobody has seen it yet, and a copy would take longer than the decision did.
        object.__setattr__(report, "seconds", perf_counter() - begin)
        self.last = report
        self._journal.publish(report)
        self._give_up_if_stuck(report)

    def _judge(self) -> None:
        """Measure the update, made or still to come, and scale it or keep it from counting."""
        has_graph = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what torch.no_grad does, which here shows in the cost
        try:
            self._verdict = self._judged_step()
        finally:
            torch._C._set_grad_enabled(has_graph)

    def _judged_step(self) -> tuple[StepReport, Reading]:
        update = self._change.update(self._recorder.take())
        gather = partial(gathered, group=self._group) if world_size(self._group) > 1 else None
        measurement, reading = self._meter.measure(update, self._direction_options(), gather)
        if reading.estimator != "predicted":  # which all workers know already
            measurement = self._agreed(measurement, reading)
            if not self._meter.suffices(measurement, reading):
                measurement, reading = self._meter.measure_now(update)
                measurement = self._agreed(measurement, reading)
            self._meter.learn(measurement, reading)
        lr = float(self.optimizer.param_groups[0].get("lr", nan))
        report = self._controller.decide(measurement, lr, reading.estimator)
        if report.status == "skipped":
            self._change.restore()
        elif report.scale != 1.0:
            self._change.rescale(report.scale)
        return report, reading

    def _agreed(self, measurement: Measurement, reading: Reading) -> Measurement:
        self._journal.introduce(self._meter.logits_found, self._controller.step)
        if reading.warning is not None:
            self._journal.warn_once(reading.warning)
        head = self._controller.head_of(measurement.bottleneck)
        if head is not None:
            self._journal.note({"head": head})
        return agree(measurement, self._group)

    def _note_radii(self, reading: Reading, step_norm: float) -> None:
        if self._inside is None:
            return
        self.last_radii = radii_of_step(self._inside, reading, step_norm)
        self._journal.note(self.last_radii)
        for kind, reason in self.last_radii.get("radii_reason", {}).items():
            self._journal.warn_once(f"the {kind} radius is not measured: {reason}")

    def _direction_options(self) -> tuple[float, ...]:
        """Return what turns the direction of an update: which parameters move, and how far."""
        first, *others = (float(group.get("lr", nan)) for group in self.optimizer.param_groups)
        shares = (round(rate / first, 1) if first else rate for rate in others)
        return (len(self._change.params), bool(first), *shares)

    def _give_up_if_stuck(self, report: StepReport) -> None:
        skips = self._controller.skips_in_a_row
        if skips >= self._max_consecutive_skips:
            raise RuntimeError(
                f"SafeStep: {skips} steps in a row were not taken; the last because "
                f"{report.reason}. Parameters and optimizer state are those of the last step that "
                "was. Look for the cause there, lower the learning rate, or raise "
                "`max_consecutive_skips`."
            )

    def _trained(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _settings(self) -> dict[str, Any]:
        return {
            "optimizer": type(self.optimizer).__name__,
            "parameters": sum(param.numel() for param in self._trained()),
            "max_normalized_step": self._controller.max_normalized_step,
            "radius": self._controller.radius,
            "estimator": self._estimator,
            "action": self._controller.action,
            "quantile": self._controller.quantile,
        }


class _StepHook(DetachableHook):
    """Marks an optimizer that a SafeStep is attached to."""


def _check_arguments(
    optimizer: Any, model: Any, estimator: str, logits: Any, max_consecutive_skips: Any
) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "SafeStep: expected `optimizer` to be a torch.optim.Optimizer or to wrap one, got "
            f"{type(optimizer).__name__}. Pass the optimizer whose step() updates the parameters."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"SafeStep: expected `model` to be a torch.nn.Module, got {type(model).__name__}. "
            "Pass the module whose forward computes the logits."
        )
    if estimator not in ("auto", "jvp", "secant", "difference"):
        raise ValueError(
            "SafeStep: expected `estimator` to be 'auto', 'jvp', 'secant' or 'difference', got "
            f"{estimator!r}. 'jvp' measures every step exactly."
        )
    if logits is not None and not callable(logits):
        raise TypeError(
            f"SafeStep: expected `logits` to be callable, got {type(logits).__name__}. "
            "Pass a function from the model's output to its logits."
        )
    if not (isinstance(max_consecutive_skips, int) and max_consecutive_skips > 0):
        raise ValueError(
            "SafeStep: expected `max_consecutive_skips` to be a positive integer, got "
            f"{max_consecutive_skips!r}. 25 is the default."
        )
    if any(isinstance(h, _StepHook) for h in optimizer._optimizer_step_pre_hooks.values()):
        raise ValueError(
            "SafeStep: expected an `optimizer` without a SafeStep, got one that has it already. "
            "Call detach() on the other one first."
        )
