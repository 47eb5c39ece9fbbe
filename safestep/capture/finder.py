"""Run a call again and find the logits that its loss is a function of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safestep._torch import forward_mode_enabled
from safestep.capture.gradient import GradientEvidence
from safestep.capture.logits import Logits, describe
from safestep.capture.loss_watch import LossInput, LossWatch
from safestep.capture.losses import LOSS_FUNCTIONS, Part
from safestep.capture.output_weights import of_logits
from safestep.capture.outputs import named_tensors
from safestep.capture.own_functions import learn
from safestep.capture.plan import (
    LogitsNotFoundError,
    Plan,
    examine_outputs,
    plan_of_losses,
    plan_of_outputs,
)
from safestep.capture.row_losses import UNWEIGHED
from safestep.capture.row_weights import EventGradient, row_losses, weighted_rows
from safestep.radius.loss_change import RowLoss

if TYPE_CHECKING:
    from safestep.capture.call import Call


# Maps the output of a call to logits, to (logits, mask), or to a list of these.
LogitsFn = Callable[[Any], Any]
# Makes what is entered around the user's code each time that it runs.
Around = Callable[[], AbstractContextManager[Any]]


class LogitFinder:
    """Find the logits of calls, and remember where they were.

    The user's function takes precedence. If a call returns the loss, the logits are the inputs of
    the loss's softmaxes, sigmoids and loss functions. If it returns a model's output, they are the
    output tensors whose gradient shows that they enter a softmax.

    Args:
        logits: The user's function from the output of a call to its logits, classes last. It
            returns a tensor, a pair of a tensor and a bool mask of the rows that count, or a list
            of these for several heads.

    Attributes:
        description: One line about the logits found; renewed when the plan for a call is made anew.
            None before the first call.
        warning: Assumptions about the logits that could not be checked, None if there are none.
        dtypes: Floating-point types that the calls were seen to compute in.
        show: Given each call that runs again, its output and what was seen in it; None for none.
    """

    def __init__(self, logits: LogitsFn | None = None) -> None:
        self.description: str | None = None
        self.warning: str | None = None
        self.dtypes: set[torch.dtype] = set()
        self.show: Callable[[Call, Any, LossWatch], None] | None = None
        self._logits = logits
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._latest: Plan | None = None
        self._cannot_weigh = False

    def find(self, call: Call, around: Around = nullcontext) -> list[Logits]:
        """Run a call again and return its logits.

        Args:
            call: The call.
            around: Makes what is entered around the call and the user's function.

        Returns:
            One entry for each softmax, or several where its logits are computed in parts.

        Raises:
            LogitsNotFoundError: If no tensor is known to enter a softmax.
            TypeError: If the user's function returns something other than logits.
        """
        if call.examples is not None:
            return self._find_again(call, around)
        if self._logits is not None:
            output, watch = self._first_run(call, around, frozenset())
            with around():
                told = self._logits(output)
            found = _as_told(told, call.gradients)
            if self.description is None:
                self.description = describe(found)
            return found
        keep = None if self._latest is None else self._latest.events
        output, watch = self._first_run(call, around, keep)
        key = _key(call, watch)
        known = self._plans.get(key)
        plan = None if known is None else _refreshed(known, call, output)
        is_new = plan is None
        if plan is not None:
            self._plans[key] = plan
        else:
            known_functions = len(LOSS_FUNCTIONS)
            plan = self._weighed(_plan(call, around, output, watch), call)
            if len(LOSS_FUNCTIONS) > known_functions:  # learned after this run, which lacks them
                output, watch = _watched(call, around, None)
                key = _key(call, watch)
            self._plans[key] = plan
        self._latest = plan
        if call.keeper is not None:
            call.keeper.settle(name for name, form in plan.outputs.items() if form.is_settled)
        if watch.keep is not None and not plan.events <= watch.keep:
            output, watch = _watched(call, around, plan.events)
        # The weight of one loss among several shows only in the gradients of all.
        is_single = len(plan.events) + len(plan.outputs) == 1
        weights = self._weights(call, plan.weighed if is_single else plan.events)
        found = _planned(plan, call, output, watch, weights, is_single=is_single)
        if is_new:
            self.description = describe(found)
            self.warning = "; ".join(filter(None, (plan.doubts(), self.warning))) or None
        return found

    @property
    def understates(self) -> bool:
        """Whether the loss has a part that is not measured as the latest logits are."""
        return self._latest is not None and self._latest.understates

    def _find_again(self, call: Call, around: Around) -> list[Logits]:
        """Return the logits of a call's first examples, where those of all were found last.

        Raises:
            LogitsNotFoundError: If they are elsewhere.
        """
        if self._logits is not None:
            output = call.run(around())
            with around():
                told = self._logits(output)
            return _as_told(told, call.gradients)
        plan = self._latest
        if plan is None or plan.weighed:
            raise LogitsNotFoundError("the weight of a part of the rows shows only in all of them")
        output, watch = _watched(call, around, plan.events)
        if self._plans.get(_key(call, watch)) is not plan:
            raise LogitsNotFoundError("a part of the batch takes another way through the model")
        return _planned(plan, call, output, watch, None, is_single=True)

    def _first_run(
        self, call: Call, around: Around, keep: frozenset[int] | None
    ) -> tuple[Any, LossWatch]:
        output, watch = _watched(call, around, keep)
        self.dtypes |= watch.dtypes
        if self.show is not None:
            self.show(call, output, watch)
        return output, watch

    def _weighed(self, plan: Plan, call: Call) -> Plan:
        """Return the plan with the events whose rows must be weighed at each step."""
        if len(plan.events) < 2:
            return plan
        # One of several losses may currently have weight 0.
        weights = self._weights(call, plan.events)
        idle = {index for index, each in weights.items() if not bool(each.flags.any())}
        return replace(plan, weighed=plan.weighed | idle)

    def _weights(self, call: Call, events: frozenset[int]) -> dict[int, EventGradient]:
        if not events or self._cannot_weigh:
            return {}
        try:
            return weighted_rows(call, events)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):  # the next step may have more room
                return {}
            self._cannot_weigh = True
            self.warning = (
                "rows that weigh nothing in the loss were not told from the others, and count "
                f"({str(error).partition('. ')[0]})"
            )
            return {}


def find_logits(
    call: Call, logits: LogitsFn | LogitFinder | None = None, around: Around = nullcontext
) -> list[Logits]:
    """Run a call again and return the logits that its loss is a function of.

    Args:
        call: The call to run again.
        logits: The user's function from the output to the logits, or a finder that keeps its plan.
        around: Makes what is entered around the call and the user's function.

    Returns:
        The result of ``LogitFinder.find``, without empty logits.

    Raises:
        LogitsNotFoundError: If no logits are found, or all are empty, or the call cannot run again.
    """
    if call.obstacle is not None:
        raise LogitsNotFoundError(call.obstacle)
    if call.is_resting:
        raise LogitsNotFoundError("the loss changed within a step; the next one is measured")
    finder = logits if isinstance(logits, LogitFinder) else LogitFinder(logits)
    is_empty = not call.gradients and bool(call.empty)
    heads = [] if is_empty else finder.find(call, around)
    found = [each for each in heads if 0 not in each.source.shape]
    if not found:
        raise LogitsNotFoundError("the batch is empty: there is no row of logits to measure")
    return found


def _watched(call: Call, around: Around, keep: frozenset[int] | None) -> tuple[Any, LossWatch]:
    watch = LossWatch(keep)
    try:
        return call.run(around(), watch), watch
    except RuntimeError as error:
        if not call.lacks_graph(error):
            raise
    # By another watch, since this one has seen a part of the call.
    return _watched(call, around, keep)


def _refreshed(plan: Plan, call: Call, output: Any) -> Plan | None:
    """Return the plan for another step of the same loss; None if it has to be made anew."""
    again: Plan | None = None
    try:
        again = plan.refreshed(output, call.gradients)
    finally:
        if again is None and call.keeper is not None:
            call.keeper.forget()
    return again


def _plan(call: Call, around: Around, output: Any, watch: LossWatch) -> Plan:
    if not call.gradients:
        with _graph_alone():
            output, watch = _watched(call, around, None)
            if learn(output, lambda: _watched(call, around, None)[0]):
                output, watch = _watched(call, around, None)
        return plan_of_losses(output, watch.seen)
    live = {name: found for name, found in call.gradients.items() if found.is_live}
    if not live:
        raise LogitsNotFoundError(
            "the gradient of the loss is zero at all that the model returns, so that nothing shows "
            "where the logits are; they are looked for again at the next step"
        )
    plan = _plan_of_live(call, around, output, watch, live)
    return replace(plan, idle=frozenset(call.gradients.keys() - live.keys()))


def _plan_of_live(
    call: Call,
    around: Around,
    output: Any,
    watch: LossWatch,
    gradients: Mapping[str, GradientEvidence],
) -> Plan:
    forms = examine_outputs(output, gradients)
    seen: Mapping[int, LossInput] = {}
    if len(forms) > 1 or None in forms.values():
        with _graph_alone():
            output, watch = _watched(call, around, None)
        seen = watch.seen
    uses = {name: each.use for name, each in gradients.items() if each.use is not None}
    return plan_of_outputs(output, forms, seen, uses)


@contextmanager
def _graph_alone() -> Iterator[None]:
    # The autograd functions in fully_shard's hooks raise if a graph and a tangent are both on.
    with torch.enable_grad(), forward_mode_enabled(False):
        yield


def _planned(
    plan: Plan,
    call: Call,
    output: Any,
    watch: LossWatch,
    weights: Mapping[int, EventGradient] | None,
    *,
    is_single: bool,
) -> list[Logits]:
    """Return the logits in the places of a plan; without `weights`, without their loss."""
    found = []
    for index in sorted(plan.events):
        seen = watch.seen[index]
        count = watch.names[:index].count(seen.entry.name)
        name = f"input of {seen.entry.name}" + (f" (call {count + 1})" if count else "")
        weight = None if weights is None else weights.get(index)
        is_masked = weight is not None and index in plan.weighed
        parts = _masked(seen.parts, weight.flags) if weight and is_masked else seen.parts
        losses: Sequence[RowLoss | str] = [_OF_A_PART] * len(seen.parts)
        if weights is not None:
            losses = row_losses(seen, weight, None if is_single else weights, call.gradients)
        found += [
            Logits(name, source, mask, loss)
            for (source, mask), loss in zip(parts, losses, strict=True)
        ]
    tensors = dict(named_tensors(output))
    for name, form in plan.outputs.items():
        values, mask = form.read(tensors[name], call.gradients[name])
        loss: RowLoss | str = _OF_A_PART
        if weights is not None:
            loss = form.row_loss(values, call.gradients[name])
        found.append(Logits(form.describe(name), values, mask, loss))
    return found


_OF_A_PART = "only a part of the batch was measured"


def _key(call: Call, watch: LossWatch) -> tuple[str, ...]:
    return (*sorted(call.gradients), "", *watch.names)


def _masked(parts: Sequence[Part], flags: Tensor) -> Iterator[Part]:
    """Yield the parts of one set of logits, counting only rows that are also True in `flags`."""
    begin = 0
    for source, mask in parts:
        rows = source.shape[:-1]
        if flags.ndim == 0:
            own = flags.expand(rows)
        else:
            own = flags.reshape(-1, *rows[1:])[begin : begin + rows[0]]
        begin += rows[0]
        yield source, own if mask is None else own & mask


def _as_told(told: Any, gradients: Mapping[str, GradientEvidence]) -> list[Logits]:
    """Return the logits from the result of the user's function.

    Raises:
        TypeError: If the result is not of a supported form.
    """
    heads = told if isinstance(told, list) else [told]
    found = []
    for index, head in enumerate(heads):
        name = "logits(output)" if len(heads) == 1 else f"logits(output)[{index}]"
        values, mask = head if isinstance(head, tuple) and len(head) == 2 else (head, None)
        if not isinstance(values, Tensor) or not (mask is None or isinstance(mask, Tensor)):
            raise TypeError(
                "SafeStep: expected `logits` to return a tensor with the classes on its last axis, "
                f"a pair of one and a mask, or a list of such, got {type(told).__name__}. Return "
                "what enters the softmax."
            )
        if values.ndim == 0:
            raise TypeError(
                "SafeStep: expected `logits` to return a tensor with the classes on its last axis, "
                "got a single number. It is given what the recorded function returns."
            )
        evidence = _evidence_of(values, gradients)
        # Of several heads, each may be the output divided by another temperature.
        loss = UNWEIGHED
        if evidence is not None and len(heads) == 1:
            loss = of_logits(values, evidence)
        mask = evidence.counted if mask is None and evidence is not None else mask
        found.append(Logits(name, values, mask, loss))
    return found


def _evidence_of(
    logits: Tensor, gradients: Mapping[str, GradientEvidence]
) -> GradientEvidence | None:
    """Return the gradient at the one output tensor that has the rows of `logits`, if it is one."""
    rows = [evidence for evidence in gradients.values() if evidence.class_axis is not None]
    fitting = [each for each in rows if each.counted.shape == logits.shape[:-1]]
    return fitting[0] if len(fitting) == 1 else None
