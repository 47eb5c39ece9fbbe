"""Find the optimizer to guard, hook its step, and tell nested calls of its step apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from safestep._torch import current_graph_task
from safestep.capture.hooks import StepHook, kept_out
from safestep.guard.optimizer_state import is_optimizer_like

# The code of torch's wrapper around every step(), which calls the hooks.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def is_within_step(optimizer: Optimizer) -> bool:
    """Return whether the running step hook belongs to a step that another step called.

    Args:
        optimizer: The optimizer, whose ``step`` may call ``super().step``.

    Returns:
        True in the hooks of the inner step.
    """
    return steps_under_way(optimizer) > 1


def steps_under_way(optimizer: Optimizer) -> int:
    """Return how many calls of an optimizer's step the caller is in, where torch hooks them.

    Args:
        optimizer: The optimizer.

    Returns:
        The number.
    """
    frame, steps = sys._getframe(), 0
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer:
            steps += 1
        frame = frame.f_back
    return steps


def is_within_backward() -> bool:
    """Return whether a backward pass is running, as where a gradient hook makes the step."""
    return current_graph_task() != -1


def why_no_calls(has_run: bool, had_graph: bool) -> str:
    """Return why no recorded call belongs to the step under way.

    Args:
        has_run: Whether the forward of the model was called since the last step.
        had_graph: Whether a call of it returned a tensor that requires a gradient.

    Returns:
        The reason, with what to do.
    """
    if is_within_backward():
        return _IN_BACKWARD
    why = _FROZEN if has_run and not had_graph else _UNUSED if has_run else _NOT_CALLED
    return _NO_CALLS.format(why)


_NO_CALLS = (
    "no gradient came back through a forward call of `model` since the last step: {}; pass the "
    "module whose forward computes the logits from trained parameters, or tell the guard the whole "
    "step with guard.record(training_step, batch)"
)
_NOT_CALLED = (
    "its forward was not called, though its submodules, its other methods or what torch.compile "
    "made of it may have been"
)
_FROZEN = "what it returned requires no gradient, since it is frozen or ran under torch.no_grad"
_UNUSED = "what it returned is no part of a loss that trains this optimizer's parameters"
_IN_BACKWARD = (
    "the optimizer steps within the backward pass, where the step of the other parameters is not "
    "known yet; step after backward() to measure the radius"
)


def hooked_optimizer(optimizer: Any) -> Any:
    """Return the optimizer whose step is to be hooked, inside wrappers such as Accelerate's.

    Args:
        optimizer: An optimizer, or a wrapper that holds one in ``.optimizer``.

    Returns:
        The outermost optimizer that has a state or step hooks of its own, else the innermost.

    Raises:
        TypeError: If it is not an optimizer.
        ValueError: If it has a SafeStep already, or steps one parameter at a time.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        # Fabric's wrapper shows the hooks of the optimizer inside as its own.
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
        if hooks is not None and hooks is not getattr(inner, "_optimizer_step_pre_hooks", None):
            break
        state = vars(optimizer).get("state")
        if state is not None and state is not getattr(inner, "state", None):
            break  # such as slow weights, which its step moves together with the parameters
        optimizer = inner
    _check(optimizer)
    return optimizer


def hook_steps(
    optimizer: Any,
    before: Callable[..., Any],
    after: Callable[..., Any],
    before_failed: Callable[[BaseException], None],
    after_failed: Callable[[BaseException], None],
) -> Sequence[Any]:
    """Call functions before and after every step of an optimizer, and keep their errors out of it.

    Args:
        optimizer: A torch optimizer, or an object that can be used as one.
        before: Called with the optimizer, ``args`` and ``kwargs`` of its step; may return others.
        after: Called with the same.
        before_failed: Told of what `before` raises, as in ``kept_out``.
        after_failed: Told of what `after` raises.

    Returns:
        Handles with a ``remove()``.
    """
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return (
            optimizer.register_step_pre_hook(StepHook(before, before_failed)),
            optimizer.register_step_post_hook(StepHook(after, after_failed)),
        )
    before, after = kept_out(before, before_failed), kept_out(after, after_failed)
    optimizer.step = step = _HookedStep(optimizer, before, after)
    return (step,)


def _check(optimizer: Any) -> None:
    # That a SafeStep can be attached.
    if not (isinstance(optimizer, Optimizer) or is_optimizer_like(optimizer)):
        raise TypeError(
            "SafeStep: expected `optimizer` to be a torch.optim.Optimizer or to wrap one, got "
            f"{type(optimizer).__name__}. Pass the optimizer whose step() updates the parameters."
        )
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if isinstance(optimizer.step, _HookedStep) or any(isinstance(h, StepHook) for h in hooks):
        raise ValueError(
            "SafeStep: expected an `optimizer` without a SafeStep, got one that has it already. "
            "Call detach() on the other one first."
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(group.get("gradient_release") for group in optimizer.param_groups) or any(
        hasattr(param, "_in_backward_optimizers") for param in params
    ):
        raise ValueError(
            "SafeStep: expected an `optimizer` that updates all parameters in one step, got "
            f"{type(optimizer).__name__} that updates each within the backward pass (gradient "
            "release). Call its step() after backward() instead: no radius is known before then."
        )


class _HookedStep:
    """The step of an optimizer that takes no hooks, between two functions; copies lose it."""

    def __init__(
        self, optimizer: Any, before: Callable[..., Any], after: Callable[..., Any]
    ) -> None:
        self._optimizer, self._step = optimizer, optimizer.step
        self._before, self._after = before, after
        self._is_attached = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the step returns."""
        if not self._is_attached:  # a scheduler has wrapped this step
            return self._step(*args, **kwargs)
        args, kwargs = self._before(self._optimizer, args, kwargs) or (args, kwargs)
        result = self._step(*args, **kwargs)
        self._after(self._optimizer, args, kwargs)
        return result

    def remove(self) -> None:
        """Give the optimizer its own step again."""
        self._is_attached = False
        if vars(self._optimizer).get("step") is self:
            del self._optimizer.step

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._optimizer, "step")
