"""Tell in which precision a call computes, and run it without autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from safestep.capture import LogitFinder, Logits
from safestep.capture.call import Call
from safestep.capture.isolation import without_side_effects
from safestep.capture.unwinding import undone


def coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the floating point type with the largest rounding error."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a type is coarser than float32."""
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


@contextmanager
def without_autocast() -> Iterator[None]:
    """Keep every autocast region that opens inside switched off, a model's own ones included."""
    enter = torch.autocast.__enter__

    def switched_off(region: torch.autocast) -> torch.autocast:
        wanted, region._enabled = region._enabled, False
        try:
            return enter(region)
        finally:
            region._enabled = wanted

    with undone(partial(setattr, torch.autocast, "__enter__", enter)):
        torch.autocast.__enter__ = switched_off  # type: ignore[method-assign]
        yield


def run_precisely(
    call: Call, module: torch.nn.Module, params: Sequence[Tensor], finder: LogitFinder
) -> tuple[list[Logits], torch.dtype, bool]:
    """Run a call without autocast if that changes nothing but its precision.

    Autocast stays where the parameters themselves are in half precision, where code that casts by
    hand cannot do without it, and where the call draws random numbers on a GPU, whose dropout
    masks may differ between types.

    Returns:
        The logits found, the coarsest type the run computed in, and whether autocast was off.

    Raises:
        RuntimeError: Whatever the model raises with autocast; without it, only if memory runs out.
    """
    own = {param.dtype for param in params}
    if _may_be_coarse(call, finder) and not is_half(coarsest(own)):
        try:
            with without_autocast():
                found, seen, has_drawn = _seen_run(call, module, finder)
        except RuntimeError as error:  # two types in one product, or no kernel for float32
            if isinstance(error, torch.OutOfMemoryError):
                raise
        else:
            if not has_drawn:
                return found, coarsest(own | seen), True
    found, seen, _ = _seen_run(call, module, finder)
    return found, coarsest(own | seen | {dtype for _, dtype in call.autocast}), False


def _may_be_coarse(call: Call, finder: LogitFinder) -> bool:
    """Return whether a call may compute in half precision, as far as is known before it runs."""
    known = finder.dtypes | {dtype for _, dtype in call.autocast}
    return not known or is_half(coarsest(known))


def _seen_run(
    call: Call, module: torch.nn.Module, finder: LogitFinder
) -> tuple[list[Logits], set[torch.dtype], bool]:
    """Return the logits, the types seen in this run alone, and whether a GPU drew in it."""
    earlier, finder.dtypes = finder.dtypes, set()
    try:
        with without_side_effects(module, call.unused_generators):
            found = finder.find(call)
            states = torch.cuda.get_rng_state_all() if call.random.cuda else ()
            has_drawn = any(map(_differ, call.random.cuda, states))
        return found, finder.dtypes, has_drawn
    finally:
        finder.dtypes = earlier | finder.dtypes


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other)
