"""Rules that are SafeStep with one set of options each, and optimizers it gains nothing on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safestep import SafeStep

from .packaged_rules import ScheduleFree
from .rule import Rule


class Guarded(Rule):
    """Clipping at 1, and a SafeStep."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(model, lr, betas)
        self.guard = SafeStep(self.optimizer, model, **self.options)
        self.optimizer.register_step_post_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.touched += self.guard.last.scale != 1.0

    def allows(self, loss: Tensor) -> bool:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return True


class Certified(Guarded):
    """The guard on the certified radius."""

    options: ClassVar = {"radius": "certified"}


class Decrease(Guarded):
    """The guard that acts only where the linearised loss does not fall enough."""

    options: ClassVar = {"sufficient_decrease": 0.0}


class Set(Guarded):
    """Every step at r = 1: a learning rate from the radius alone."""

    finds_rate = True
    options: ClassVar = {"action": "set"}


class Adadelta(Rule):
    """Adadelta with torch's defaults, whose healthy steps are long."""

    healthy_only = True

    def make(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adadelta(self.model.parameters())


class GuardedAdadelta(Adadelta, Guarded):
    """Adadelta with torch's defaults, and a guard."""

    allows = Rule.allows


class GuardedScheduleFree(ScheduleFree, Guarded):
    """AdamW without a schedule, and a guard."""

    healthy_only = True
    allows = Rule.allows

    def __init__(self, model: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(model, lr, betas)
        self.touched = 0
