"""Where an optimizer's step begins and ends, also where the guard fails or is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from safestep.capture.failures import one_line
from safestep.capture.hooks import is_passed_on, kept_out
from safestep.capture.recorder import Recorder
from safestep.capture.unwinding import Surroundings, completed
from safestep.guard.attach import hook_steps, is_within_step
from safestep.guard.controller import StepController
from safestep.guard.step_report import StepReport
from safestep.guard.undo import Undo
from safestep.measure.update import Measurement

if TYPE_CHECKING:
    from typing_extensions import Self


class StepLifecycle:
    """Call the guard at the right moments of ``optimizer.step()``, and keep its errors out of it.

    An error of the guard's own leaves the step unmeasured, with the reason in the report. An
    interrupt, such as KeyboardInterrupt, passes after parameters and optimizer state were put back
    to where they were before the step.

    Args:
        optimizer: The optimizer.
        undo: What its step can be undone by.
        controller: Counts the steps.
        recorder: Recorded the calls of the step.
        is_ahead: Whether to judge a step before the optimizer makes it.

    Attributes:
        last: The StepReport of the latest step, None before the first.
        enabled: False lets steps pass unseen.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        undo: Undo,
        controller: StepController,
        recorder: Recorder,
        *,
        is_ahead: bool,
    ) -> None:
        self.optimizer = optimizer
        self.last: StepReport | None = None
        self.enabled = True
        self._undo = undo
        self._controller = controller
        self._recorder = recorder
        self._is_ahead = is_ahead
        self._verdict: tuple[StepReport, Measurement] | None = None
        self._obstacle: str | None = None  # why this step cannot be measured
        self._is_blind = False  # the start of the step is not known
        self._may_be_spared = False  # the next step may be known to be unmeasured
        self._surroundings = Surroundings()  # of the running hook
        self._counts: dict[str, Any] | None = None  # of the controller, before the step
        self._seconds: float | None = None  # None: no step is under way
        self._inner_steps = 0  # under way within it: a subclass may call super().step()

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
        failed = partial(self._recorder.failures.note, "recording a call")
        kept_out(self._recorder.record, failed)(function, *args, **kwargs)

    def forget(self) -> None:
        """Void the calls recorded since the last step: the step they were for never came.

        GradScaler leaves a step out where a gradient is infinite. Forward calls of the model that
        the guard finds by itself are then void anyway; those it was told of with `record` are not.
        """
        self._recorder.take()

    def detach(self) -> None:
        """Remove every hook; the optimizer and the model are then as they were before."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __reduce__(self) -> str:
        raise TypeError(
            "SafeStep: expected not to be copied or pickled, since its hooks belong to one "
            "optimizer. Save guard.state_dict() and attach a new SafeStep."
        )

    def _attach(self) -> Sequence[Any]:
        """Register the hooks.

        Returns:
            Their handles, which remove them.
        """
        return hook_steps(
            self.optimizer, self._before_step, self._after_step, self._not_begun, self._not_ended
        )

    def _judged_step(self) -> tuple[StepReport, Measurement]:
        """Measure the update, made or still to come, and scale it or keep it from counting."""
        raise NotImplementedError

    def _step_known_unmeasured(self) -> tuple[StepReport, Measurement] | None:
        """Return the verdict on a step that will be neither measured nor undone, else None."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Prepare a step."""
        raise NotImplementedError

    def _end(self, report: StepReport | None) -> None:
        """Say what happened to the step, or that it passed unseen."""
        raise NotImplementedError

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._seconds is not None:
            if is_within_step(self.optimizer):
                self._inner_steps += 1
                return None
            self._undo.release()  # of a step that raised
        self._seconds, self._inner_steps, self._verdict = None, 0, None
        self._is_blind, self._obstacle, self._counts = False, None, None
        if not self.enabled:
            self._end(None)
            self._recorder.take()  # the calls of this step
            return None
        begin = perf_counter()
        self._seconds = 0.0
        self._surroundings, self._counts = Surroundings(), self._controller.state_dict()
        self._recorder.notice_effects()
        self._begin()
        if not any(map(callable, (*args, *kwargs.values()))):
            self._prepare()
            self._seconds = perf_counter() - begin
            return None
        # The closure makes the forward calls of the step, and its gradients.
        self._recorder.begin_step()
        waits = self._is_ahead or self._may_be_spared
        if waits:
            self._is_blind, self._obstacle = True, "the optimizer did not call its closure"
        else:
            self._undo.take()
        self._seconds = perf_counter() - begin
        if not waits:
            return None
        return tuple(map(self._preparing, args)), {k: self._preparing(v) for k, v in kwargs.items()}

    def _prepare(self) -> None:
        """Copy what may have to be undone; judge a step that is still to come."""
        self._is_blind, self._obstacle = False, None
        self._verdict = self._step_known_unmeasured()
        if self._verdict is not None:
            return
        self._undo.take()
        if self._is_ahead:
            self._judge()

    def _preparing(self, argument: Any) -> Any:
        """Return a closure that also prepares the step, before the optimizer makes it."""
        if not callable(argument):
            return argument
        prepare: Callable[[], None] = kept_out(self._prepare, self._not_begun)

        def closure() -> Any:
            loss = argument()
            begin = perf_counter()
            prepare()
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
        self._surroundings = Surroundings()
        if self._verdict is None:
            self._judge()
        assert self._verdict is not None
        report = replace(self._verdict[0], seconds=perf_counter() - begin)
        # From here on, an interrupt undoes nothing.
        self._seconds, self._counts, self.last = None, None, report
        self._undo.release()
        self._end(report)
        self._controller.give_up_if_stuck(report)

    def _judge(self) -> None:
        """Come to a verdict, whatever fails."""
        self._surroundings = Surroundings()
        try:
            with torch.no_grad():
                self._verdict = self._judged_step()
            self._surroundings.settle()
        except Exception as error:
            if is_passed_on(error):
                raise
            interrupt = self._surroundings.interrupt(error)
            if interrupt is not None:
                raise interrupt from None
            self._surroundings.restore(error)
            self._put_counts_back()
            blank = Measurement.failed(own_failure(error))
            self._verdict = self._controller.decide(blank, nan), blank

    @property
    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0].get("lr", nan))

    def _put_counts_back(self) -> None:
        if self._counts is not None:
            self._controller.load_state_dict(self._counts)

    def _not_begun(self, error: BaseException) -> None:
        """Let a step go unmeasured that could not be prepared; an interrupt ends it."""
        self._surroundings.restore(error)
        if is_passed_on(error):
            self._put_counts_back()
            completed(self._undo.release)
            self._seconds = None
        else:
            self._is_blind, self._obstacle = True, own_failure(error)

    def _not_ended(self, error: BaseException) -> None:
        """Go on where the report of a step failed; an interrupt undoes the step."""
        self._surroundings.restore(error)
        if is_passed_on(error):
            if self._seconds is not None and not self._is_ahead:
                completed(self._undo.restore)
                self._put_counts_back()
            elif self._seconds is not None and self._verdict is not None:
                self.last = self._verdict[0]  # of a step that was made as it was judged
            completed(self._undo.release)
            self._seconds = None
            return
        self._recorder.failures.note("reporting a step", error, is_needed=False)
        if self._seconds is not None and self._verdict is not None:
            self.last = self._verdict[0]
        self._seconds = None
        self._undo.release()


def own_failure(error: BaseException) -> str:
    """Return the reason of a step that is not measured because of the guard itself.

    Args:
        error: What failed.

    Returns:
        The reason, in a user's words.
    """
    return f"SafeStep itself failed ({one_line(error)}); the step was left alone"
