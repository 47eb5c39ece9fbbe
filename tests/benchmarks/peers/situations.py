"""What goes wrong in the runs of bench_peers.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

STEPS = 120
TROUBLE = 70  # the step at which it begins


def _same_batch(step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, targets


def _same_logits(step: int, logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class Situation:
    """What goes wrong in a run.

    Attributes:
        rate: From the step to the factor of the learning rate.
        warm_up: Number of steps over which the learning rate rises.
        spoil: Changes inputs and targets of a step in trouble.
        logits: Changes the logits of a step in trouble.
        betas: Those of Adam.
        context: What the forward pass runs in.
    """

    rate: Callable[[int], float] = lambda step: 1.0
    warm_up: int = 20
    spoil: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = _same_batch
    logits: Callable[[int, Tensor], Tensor] = _same_logits
    betas: tuple[float, float] = (0.9, 0.999)
    context: Callable[[], Any] = field(default=nullcontext)

    def with_good_data(self) -> Situation:
        """Return what is left of it on a rank whose loader works."""
        return replace(self, spoil=_same_batch, logits=_same_logits)


def _once(factor: float) -> Situation:
    return Situation(lambda step: factor if step == TROUBLE else 1.0)


def _held(factor: float) -> Situation:
    return Situation(lambda step: factor if step >= TROUBLE else 1.0)


def _poisoned(step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, targets.flip(0).roll(1) if TROUBLE <= step < TROUBLE + 20 else targets


def _corrupted(step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One batch a hundred times as large, or of one token only."""
    if step == TROUBLE:
        inputs = 100 * inputs if inputs.is_floating_point() else torch.full_like(inputs, 7)
    return inputs, targets


RATES = {
    f"rate x{factor}": Situation(lambda step, factor=factor: factor)
    for factor in (0.1, 0.18, 0.32, 0.56, 1.8, 3.2, 5.6, 10.0)
}
TROUBLES = {
    "x10 once": _once(10.0),
    "x1000 once": _once(1e3),
    "x10,000 once": _once(1e4),
    "x10 held": _held(10.0),
    "x100 held": _held(100.0),
    "x1000 held": _held(1e3),
    "bursts": Situation(lambda step: 100.0 if step >= 40 and step % 30 < 3 else 1.0),
    "ramp": Situation(lambda step: 1000 ** (max(0, step - TROUBLE) / (STEPS - TROUBLE))),
    "no warm-up, x10": Situation(lambda step: 10.0, warm_up=1),
    "poisoned labels": Situation(spoil=_poisoned),
    "corrupted batch": Situation(spoil=_corrupted),
    "a batch of NaN": Situation(logits=lambda step, z: z * math.nan if step == TROUBLE else z),
    "beta2 0.9999": Situation(betas=(0.9, 0.9999)),
    "bf16": Situation(context=lambda: torch.autocast("cpu", torch.bfloat16)),
}
SITUATIONS = {"healthy": Situation(), **TROUBLES, **RATES}
