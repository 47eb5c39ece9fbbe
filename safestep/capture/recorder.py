"""Record the calls that an update was computed from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import cached_property, partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from safestep._torch import current_graph_task
from safestep._warn import warn_user
from safestep.capture.autograd_graph import operations_of_loss, trains_any
from safestep.capture.call import Call, is_running_again
from safestep.capture.evidence import SMALL, EvidenceKeeper, OutputValues
from safestep.capture.failures import Failures
from safestep.capture.hooks import ModuleHooks, kept_out
from safestep.capture.idle import IdleWatch, place_of
from safestep.capture.loss_notice import LossNotice
from safestep.capture.output_gradients import ROOM, OutputOrder
from safestep.capture.outputs import named_tensors
from safestep.capture.random_state import CallConditions
from safestep.capture.results import OutputResult
from safestep.capture.stand_ins import StandIns
from safestep.capture.wrappers import calls_under_way, eager_module, without_data_parallel
from safestep.parallel.norms import each_norm
from safestep.parallel.shards import are_sharded, is_sharded

# More micro-batches than anyone accumulates: beyond this, the optimizer that steps is another one.
MAX_RECORDED_CALLS = 1024


class Recorder:
    """Record the forward calls that the next update is computed from.

    A call is queued when a gradient flows back through its output. A forward pass for logging or
    evaluation is neither run again nor kept in memory.

    Args:
        model: The module that runs again, without a DistributedDataParallel wrapper around it:
            a re-run must not broadcast buffers.
        params: Returns the trained parameters. Where all their gradients are None, a new update
            begins.
        part: The submodule whose forward calls are recorded, by default `model` itself.
        watches: Whether each call notes the sizes of its outputs and of their gradients.

    Attributes:
        failures: What could not be recorded of the calls since the last step.
        resting: Looks (see ``Call.look``) of calls that are not measured for now: their gradients
            are not kept.
        seen: Whether the forward of the module ran before the step that `take` ended, and whether
            any of its calls returned a tensor with a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Callable[[], list[Tensor]],
        *,
        part: nn.Module | None = None,
        watches: bool = False,
    ) -> None:
        self.module = eager_module(model)
        self._part = self.module if part is None else eager_module(part)
        self._params = params
        self._watches = watches
        self.resting: Collection[Hashable] = ()
        self._calls: deque[Call] = deque(maxlen=MAX_RECORDED_CALLS)
        self._told: list[Call] = []  # by `record`, since the last step
        self._open: list[Call | None] = []  # None: a call that is not recorded
        self._count = 0  # of calls that began
        self._trained_by = (-1, True)  # the latest backward pass, and whether it trains
        self._backward = -1  # torch's number of the backward pass that queued the latest call
        self._has_run = self._had_graph = False  # since the last step
        self.seen = False, False
        self._is_in_step = False
        self._step_start: tuple[int, ...] | None = None  # parameters of its first call
        self._evidence = EvidenceKeeper()
        self._loss: str | None = None  # operations of the latest one
        self._order = OutputOrder()
        self._others: list[Tensor] | None = None  # parameters that the optimizer does not hold
        self._conditions = CallConditions(self.module)
        self._idle = IdleWatch(params, self.module.parameters)
        self.failures = Failures()
        self._notice = LossNotice(params, self.failures)
        target = without_data_parallel(model if part is None else part)
        if isinstance(target, torch.jit.ScriptModule):
            raise TypeError(
                "SafeStep: expected a `model` that takes forward hooks, got a ScriptModule. Put it "
                "into a module that does: torch.nn.Sequential(model)."
            )
        self._stand_ins = StandIns(target)
        self._hooks = ModuleHooks(
            target,
            kept_out(self._before, self._not_recorded),
            kept_out(self._after, self._not_recorded),
        )

    def record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        """Queue a call that is about to run, such as a training step that returns the loss.

        After the first of these, forward calls of the module are no longer recorded.

        Args:
            function: The function that is about to run.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The recorded call.
        """
        self._hooks.remove()  # in a compiled training step they would break the graph
        self._open.clear()
        call = Call.of(function, args, kwargs, self._conditions)
        if self._watches:
            call.signals += _largest(call.leaves)
        self._idle.before_call()
        self._idle.after_call()
        self._queue(call)
        self._told.append(call)
        self._notice.expect(call)
        return call

    def notice_effects(self) -> None:
        """Learn, just before the step, what calls have changed, and whether it starts elsewhere."""
        for call in self._told:
            call.notice_effects()
        now = self._place()
        for call in self._calls:
            call.is_elsewhere = call.place is not None and call.place != now
        self._told.clear()

    def begin_step(self) -> None:
        """Record calls only at the parameters of the first one that waits or comes, until `take`.

        An optimizer like LBFGS evaluates its closure again at other parameters; what the gradient
        shows there (rows that are fitted, rows that count) is not so at the start of the step.
        """
        # Schedule-free optimizers move before they evaluate; SAM after an evaluation of its own.
        self._is_in_step = True
        self._step_start = _versions(self._params()) if self._calls else None

    def take(self) -> list[Call]:
        """Return the queued calls and forget them."""
        calls = _since_cleared(list(self._calls))
        self._calls.clear()
        self._told.clear()
        self._notice.end_step()
        self._idle.stepped()
        self.seen = self._has_run, self._had_graph
        self._has_run = self._had_graph = False
        self._is_in_step, self._step_start = False, None
        self._conditions.effects.end_step()
        return calls

    def looks(self) -> frozenset[Hashable]:
        """Return what is seen of the loss of the step under way."""
        return frozenset(call.look() for call in self._calls)

    def keep_gradients(self, *, all_of_them: bool) -> None:
        """Keep the gradients at the outputs until the next step.

        Args:
            all_of_them: However large they are.
        """
        self._evidence.room = inf if all_of_them else ROOM

    def detach(self) -> None:
        """Remove the hooks and forget the queue."""
        self._hooks.remove()
        self._calls.clear()
        self._notice.end_step()

    def _not_recorded(self, error: BaseException) -> None:
        if self._open:
            self._open[-1] = None
        self.failures.note("recording a forward call", error)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open:  # inside a call, or after one that raised an error
            del self._open[max(0, calls_under_way(module) - 1) :]
        is_within = bool(self._open)
        self._open.append(None)
        if is_within or is_running_again():
            return
        self._has_run = True
        if not torch.is_grad_enabled():
            return
        if self._is_in_step and not self._is_at_start():
            return
        self._void_cleared()
        if self._idle.is_looking:
            self._idle.before_call()
        self._count += 1
        call = Call.of(self._part, args, kwargs, self._conditions)
        call.opened, call.obstacle = self._count, self._stand_ins.obstacle(module)
        self._open[-1] = call

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if len(self._open) > 1:  # calls inside this one that raised an error are still there
            del self._open[max(1, calls_under_way(module)) :]
        call = self._open.pop() if self._open else None
        if call is None:
            return
        call.notice_effects()
        call.place = self._place()
        if self._idle.is_looking:
            self._idle.after_call()
        outputs = _with_graph(output)
        self._had_graph |= bool(outputs)
        call.kept.inside = self._order.of(outputs)
        call.results, call.keeper = {}, self._evidence
        for name, tensor in outputs:
            values = self._evidence.values(name, tensor)
            failed = partial(self.failures.note, f"reading the gradient of {name}")
            tensor.register_hook(
                kept_out(self._on_gradient(call, name, values, tensor.output_nr), failed)
            )
            ends = self._ends(name, tensor.detach()) if self._watches else ()
            call.signals += ends
            call.results[name] = OutputResult.of(tensor, ends)

    def _on_gradient(
        self, call: Call, name: str, values: OutputValues | None, place: int
    ) -> Callable[[Tensor | None], None]:
        def look(gradient: Tensor | None) -> None:
            if gradient is None:  # of a compiled graph's output that the loss does not depend on
                return
            if not self._is_training():
                return
            if call not in self._calls:
                call.is_fresh = self._void_cleared(call)
                self._queue(call)
            operations = operations_of_loss()
            if operations != self._loss:  # what earlier gradients showed was of another loss
                self._loss = operations
                self._evidence.forget()
            call.losses.add(operations)
            if self.resting and None not in call.losses and call.look() in self.resting:
                call.is_resting = True
                return
            kept = self._evidence.keep(call, name, gradient.detach(), values, place)
            if self._watches:
                call.signals += self._norms(name, kept)

        return look

    def _ends(self, name: str, output: Tensor) -> Sequence[Tensor]:
        """Return the smallest and the largest number of an output; NaN if it has no order."""
        if not output.numel():
            return _ZERO, _ZERO
        try:
            return output.aminmax()
        except Exception as error:  # a complex, sparse or nested output
            self.failures.note(f"reading the size of {name}", error, is_needed=False)
            return _UNKNOWN, _UNKNOWN

    def _norms(self, name: str, gradient: Tensor) -> Sequence[Tensor]:
        """Return the norm of a gradient, or the gradient where it is small and kept anyway."""
        is_usual = gradient.layout is torch.strided and not gradient.is_nested
        if is_usual and 0 < gradient.numel() <= SMALL:
            return (gradient,)
        try:
            return each_norm([gradient]) if gradient.numel() else (_ZERO,)
        except Exception as error:
            self.failures.note(f"reading the norm of {name}'s gradient", error, is_needed=False)
            return (_UNKNOWN,)

    @cached_property
    def _one(self) -> Tensor | None:
        # Where one parameter moves, all do. Shards have another address within a call.
        params = self._params()
        return None if are_sharded(params) else next(iter(params), None)

    def _place(self) -> tuple[int, int] | None:
        return None if self._one is None else place_of(self._one)

    def _is_at_start(self) -> bool:
        """Return whether the parameters are those of the first call of the step."""
        now = _versions(self._params())
        self._step_start = self._step_start or now
        return now == self._step_start

    def _is_training(self) -> bool:
        """Return whether the backward pass under way computes gradients of trained parameters."""
        backward = current_graph_task()
        if backward == -1 or backward != self._trained_by[0]:
            self._trained_by = backward, trains_any(self._params())
        return self._trained_by[1]

    def _void_cleared(self, call: Call | None = None) -> Tensor | None:
        """Forget the queued calls if their gradients were cleared without a step.

        A GradScaler found inf, or the gradients came from another optimizer's loss. Where several
        forward passes come before the first backward pass, as in gradient surgery, gradients are
        put aside and cleared in between: these calls stay.

        Args:
            call: The call that a gradient came back to; None for one that is about to begin.

        Returns:
            Whether all gradients are zero, as ``zero_grad(set_to_none=False)`` leaves them: a
            boolean on the device, because waiting for it would delay the backward pass. None
            where there is no queued call, and for sharded and sparse gradients.
        """
        backward = current_graph_task()  # its gradients come when it ends; -1 outside
        is_new = backward != self._backward or backward == -1
        self._backward = backward
        if not is_new or not self._calls:
            return None
        params = self._params()
        if not params:  # all are frozen for now
            return None
        if not any(_has_gradient(p) for p in params):
            kept = [] if call is None else [old for old in self._calls if _is_beside(old, call)]
            self._calls.clear()
            self._calls.extend(kept)
            return None
        grads = [p.grad for p in params if p.grad is not None and p.grad.numel()]
        if backward == -1 or any(is_sharded(grad) or grad.is_sparse for grad in grads):
            return None
        return _are_zero(grads) if grads else None

    def _queue(self, call: Call) -> None:
        self._idle.backward()
        if len(self._calls) == MAX_RECORDED_CALLS:
            warn_user(
                f"SafeStep: {MAX_RECORDED_CALLS} forward passes were recorded and the optimizer it "
                "is attached to never stepped. A copied or re-created optimizer has lost its "
                "hooks: attach SafeStep to the optimizer whose step() is called."
            )
            self._calls.clear()
        call.queued = self._count
        self._calls.append(call)
        if self._others is None:
            own = set(self._params())
            # Within a call, fully_shard has whole parameters in the place of the optimizer's.
            everything = () if any(map(is_sharded, own)) else self.module.parameters()
            self._others = [param for param in everything if param not in own]
        call.kept.begin(self._others)


def _with_graph(output: Any) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in named_tensors(output) if not tensor.is_leaf]


def _versions(params: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(param._version for param in params)


def _has_gradient(param: Tensor) -> bool:
    # fully_shard holds a gradient that is not reduced yet elsewhere: there may be one.
    return param.grad is not None or is_sharded(param)


@torch.no_grad()
def _are_zero(grads: list[Tensor]) -> Tensor:
    # A 2-norm of tiny numbers would underflow; on a CPU an inf-norm takes twenty times as long.
    ends = [end.to(grads[0].device) != 0 for grad in grads for end in grad.aminmax()]
    return ~torch.stack(ends).any()


@torch.no_grad()
def _largest(leaves: Iterable[Any]) -> list[Tensor]:
    """Return the largest absolute value among all float tensors; an empty list without one."""
    ends = [
        end.float()
        for leaf in leaves
        if type(leaf) is Tensor and leaf.dtype in _FLOATS and leaf.layout is torch.strided
        if leaf.numel() and not (leaf.is_nested or leaf.is_meta)
        for end in leaf.aminmax()
    ]
    return [torch.stack([end.to(ends[0].device) for end in ends]).abs().amax()] if ends else []


_ZERO, _UNKNOWN = torch.tensor(0.0), torch.tensor(torch.nan)  # unusual data: it is measured
_FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


def _is_beside(old: Call, call: Call) -> bool:
    """Return whether a call began before the first gradient of an older one came back."""
    return call.opened <= old.queued


def _since_cleared(calls: list[Call]) -> list[Call]:
    """Return the calls since the latest backward pass that began with zero gradients."""
    starts = [call for call in calls if call.is_fresh is not None]
    if not starts:
        return calls
    flags = torch.stack([call.is_fresh for call in starts]).tolist()  # type: ignore[misc]
    for start in (call for call, is_fresh in zip(starts, flags, strict=True) if is_fresh):
        begin = calls.index(start)
        calls = [old for old in calls[:begin] if _is_beside(old, start)] + calls[begin:]
    return calls
