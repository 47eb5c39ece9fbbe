"""Scale a step of an optimizer whose state may hold the step itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safestep._torch import foreach_add_, foreach_copy_, foreach_sub
from safestep.capture.unwinding import undone
from safestep.guard.copies import Copies
from safestep.guard.optimizer_state import OptimizerState
from safestep.measure.perturb import in_chunks
from safestep.parallel.shards import local

_TOLERANCE = 1e-4  # distance from the scaled step, as a share of it
_NEAR = 0.5  # distance between an iterate and its parameter, as a share of the parameter


def rescale(after: list[Tensor], before: list[Tensor], scale: float) -> None:
    """Move tensors to before + scale * (after - before).

    Args:
        after: The tensors, after the step.
        before: Their values before it.
        scale: Factor of the move.
    """
    for ends, starts in in_chunks(after, before):
        moves = foreach_sub(ends, starts)
        foreach_copy_(ends, starts)
        foreach_add_(ends, moves, alpha=scale)
        del moves  # frees them before the next are made


def iterates(state: OptimizerState, copies: Copies) -> list[Tensor]:
    """Return the state tensors that a step may have moved together with the parameters.

    Args:
        state: The state after the step.
        copies: Copies from before the step.

    Returns:
        Float tensors of the shape of a parameter that have changed.
    """
    shapes = {local(param).shape for param in state.params}
    others = state.tensors[len(state.params) :]
    found = [t for t in others if t.is_floating_point() and local(t).shape in shapes]
    return [t for t in found if (c := copies.of(t)) is None or not torch.equal(local(t), c)]


def rescale_with_state(
    optimizer: Any,
    before: tuple[OptimizerState, Copies],
    restore: Callable[[], None],
    scale: float,
) -> bool:
    """Scale a step together with the state that holds it.

    The step is made again from the state before it, with `scale` times the learning rate. Where
    that does not end at the scaled step (it is not proportional to the learning rate), parameters
    and every state tensor that depends on the learning rate are interpolated instead.

    Args:
        optimizer: The optimizer, after its step.
        before: State and copies from before the step.
        restore: Puts everything back to before the step, gradients included.
        scale: Factor of the update.

    Returns:
        False if no state can hold the step: nothing was done.
    """
    state = OptimizerState.of(optimizer)
    moved = iterates(state, before[1])
    if not moved:
        return False
    starts = before[1].of_params
    after = Copies(state.tensors, state.params)
    after.fill()
    state.note_options(optimizer)
    try:
        restore()
        _step_again(state.optimizers, scale)
        again = OptimizerState.of(optimizer)
        if _is_at(again, starts, after, scale):
            return True
        held = _differing(state, again, after, moved)
    except Exception:  # it needs a closure, or has no learning rate
        held = None
    after.put_back()
    state.put_back()
    if held is None:
        held = [t for t in moved if _is_near_parameter(t, before)]
    pairs = [(local(t), c) for t in held if (c := before[1].of(t)) is not None]
    rescale(before[1].after, starts, scale)
    rescale([t for t, _ in pairs], [c for _, c in pairs], scale)
    return True


def _step_again(optimizers: list[Any], scale: float) -> None:
    """Run the step again with a scaled learning rate.

    Raises:
        RuntimeError: If the step communicates: ranks with another state might not run it again.
    """
    if any(type(each).__module__.startswith("torch.distributed.") for each in optimizers):
        raise RuntimeError("the step of ZeroRedundancyOptimizer communicates")
    groups = {id(g): g for each in optimizers for g in each.param_groups}.values()
    rates = [group["lr"] for group in groups]
    scaled = [rate * scale for rate in rates]
    with _without_hooks(optimizers):
        for group, rate in zip(groups, scaled, strict=True):
            group["lr"] = rate
        step = type(optimizers[0]).step
        getattr(step, "__wrapped__", step)(optimizers[0])
    for group, rate, lower in zip(groups, rates, scaled, strict=True):
        # A step that changes its learning rate has changed the scaled one.
        group["lr"] = rate if group["lr"] is lower else group["lr"] / scale


@contextmanager
def _without_hooks(optimizers: list[Any]) -> Iterator[None]:
    """Let the optimizers have no step hooks inside."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    kept = [(each, name, getattr(each, name, None)) for each in optimizers for name in names]

    def put_back() -> None:
        for each, name, hooks in kept:
            if hooks is not None:
                setattr(each, name, hooks)

    with undone(put_back):
        for each, name, hooks in kept:
            if hooks is not None:  # exchanged, not cleared: torch may be iterating over them
                setattr(each, name, OrderedDict())
        yield


def _is_at(again: OptimizerState, starts: list[Tensor], after: Copies, scale: float) -> bool:
    """Return whether the parameters are at the scaled step, up to rounding."""
    distance = length = 0.0
    for param, start, end in zip(again.params, starts, after.of_params, strict=True):
        start = _wide(start)
        goal = (_wide(end) - start) * scale
        moved = _wide(local(param.detach())) - start
        rounding = torch.finfo(param.dtype).eps * start.abs()
        distance += float(((moved - goal).abs() - rounding).clamp(min=0).square().sum())
        length += float(goal.square().sum())
    return distance <= _TOLERANCE**2 * length


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _differing(
    state: OptimizerState, again: OptimizerState, after: Copies, moved: list[Tensor]
) -> list[Tensor]:
    """Return the tensors that another learning rate gave other values."""
    twins = dict(zip(state.tensors, again.tensors, strict=True))  # raises if the structure differs
    ends = {tensor: after.of(tensor) for tensor in moved}
    return [t for t, end in ends.items() if end is None or not torch.equal(local(twins[t]), end)]


def _is_near_parameter(tensor: Tensor, before: tuple[OptimizerState, Copies]) -> bool:
    """Return whether a state tensor was an iterate: close to a parameter before the step."""
    start = before[1].of(tensor)
    if start is None:
        return False
    params = [param for param in before[1].of_params if param.shape == start.shape]
    return any(float((start - p).norm()) <= _NEAR * float(p.norm()) for p in params)
