"""Guards against bad steps, each a few lines around AdamW: what bench_peers.py compares.

StableAdamW, Stable-SPAM, schedule-free and Prodigy are taken from torch-optimi, pytorch-optimizer,
schedulefree and prodigyopt, and left out where these are not installed. The other peers are a few
lines each, from their papers; test_peer_rules.py checks each against its paper's statement.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safestep import SafeStep

WEIGHT_DECAY = 0.1


class Rule:
    """AdamW, and what a rule does to its steps; this one does nothing.

    Attributes:
        optimizer: What makes the steps.
        touched: Number of steps that the rule changed, None where it cannot be told.
        finds_rate: Whether the rule finds its learning rate and does not use the given one.
        healthy_only: Whether the rule is there to show what it does to a healthy run, and no more.
    """

    finds_rate = False
    healthy_only = False

    def __init__(self, model: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        self.model, self.betas = model, betas
        self.touched: int | None = 0
        self.optimizer = self.make(lr)

    def make(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=self.betas, weight_decay=WEIGHT_DECAY
        )

    def step(self, loss: Tensor, closure: Callable[[], Tensor]) -> None:
        """Take the step, or what the rule makes of it; `closure` returns the loss anew."""
        if self.allows(loss):
            self.optimizer.step()

    def allows(self, loss: Tensor) -> bool:
        """Change the gradients; return whether the step may be taken."""
        return True

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def clip(self, limit: float) -> float:
        """Clip the joint norm, count where that changed anything, and return it."""
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.touched += norm > limit
        return norm

    def before_evaluation(self) -> None:
        """Put the weights that are to be evaluated in place."""


class Clip(Rule):
    """The joint gradient norm at most 1 (arXiv:1211.5063, algorithm 1)."""

    def allows(self, loss: Tensor) -> bool:
        self.clip(1.0)
        return True


class ZClip(Rule):
    """Clip where the norm's z-score is over 2.5, to mean + 2.5^2 / z sigmas (arXiv:2504.02507)."""

    mean = variance = None
    warm: tuple[float, ...] = ()

    def allows(self, loss: Tensor) -> bool:
        norm = float(nn.utils.get_total_norm(self.gradients()))
        if self.mean is None:
            self.warm = (*self.warm, norm)
            if len(self.warm) == 25:
                self.mean = statistics.mean(self.warm)
                self.variance = statistics.variance(self.warm)
            return True
        sigma = math.sqrt(self.variance)
        z = (norm - self.mean) / max(sigma, 1e-6)
        if z > 2.5 or not math.isfinite(z):
            norm = self.mean + 2.5**2 / z * sigma if math.isfinite(z) else self.mean
            self.clip(norm)
        self.mean = 0.97 * self.mean + 0.03 * norm
        self.variance = 0.97 * self.variance + 0.03 * (norm - self.mean) ** 2
        return True


class AdaGC(Rule):
    """Clip each tensor to 1.05 times its own running norm (arXiv:2502.11034, algorithm 1)."""

    warm_up = 50  # 100 in the paper, whose runs are longer
    steps, norms = 0, None

    def allows(self, loss: Tensor) -> bool:
        self.steps += 1
        grads = self.gradients()
        if self.steps <= self.warm_up:
            self.clip(1.0)
            norms = torch._foreach_norm(grads)
            self.norms = (
                norms if self.norms is None else list(map(torch.minimum, self.norms, norms))
            )
            return True
        found = torch._foreach_norm(grads)
        scales = [
            (1.05 * kept / norm).clamp(max=1) for kept, norm in zip(self.norms, found, strict=True)
        ]
        self.touched += any(bool(scale < 1) for scale in scales)
        torch._foreach_mul_(grads, scales)
        self.norms = [
            0.98 * kept + 0.02 * (norm * scale)
            for kept, norm, scale in zip(self.norms, found, scales, strict=True)
        ]
        return True


class AGC(Rule):
    """Clip each unit's gradient to 0.01 of its weight's norm (arXiv:2102.06171, eq. 3)."""

    def allows(self, loss: Tensor) -> bool:
        is_touched = False
        for param in self.model.parameters():
            if param.grad is not None and param.ndim > 1:
                axes = tuple(range(1, param.ndim))
                weight, grad = (
                    torch.linalg.vector_norm(each, dim=axes, keepdim=True)
                    for each in (param.detach(), param.grad)
                )
                scale = 0.01 * weight.clamp(min=1e-3) / grad.clamp(min=1e-6)
                is_touched |= bool((scale < 1).any())
                param.grad.mul_(scale.clamp(max=1))
        self.touched += is_touched
        return True


class UpdateRMS(Rule):
    """Each tensor's update at most `lr` in root mean square (arXiv:1804.04235, algorithm 4)."""

    def step(self, loss: Tensor, closure: Callable[[], Tensor]) -> None:
        params = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in params]
        self.optimizer.step()
        is_touched, lr = False, self.optimizer.param_groups[0]["lr"]
        for start, param in zip(before, params, strict=True):
            move = param.detach() - start
            scale = (move.square().mean().sqrt() / lr).clamp(min=1)
            is_touched |= bool(scale > 1)
            param.data = torch.where(scale > 1, start + move / scale, param.detach())
        self.touched += is_touched


class SkipStep(Rule):
    """Skip where loss or gradient norm is 6 sigmas over the last 128 (as OLMo-core does)."""

    def allows(self, loss: Tensor) -> bool:
        if not hasattr(self, "seen"):
            self.seen = deque(maxlen=128), deque(maxlen=128)
        is_outlier = False
        for seen, value in zip(self.seen, (float(loss), self.clip(1.0)), strict=True):
            if len(seen) >= 64:
                limit = statistics.mean(seen) + 6 * statistics.stdev(seen)
                is_outlier |= not value <= limit
            if math.isfinite(value):
                seen.append(value)
        self.touched += is_outlier
        return not is_outlier


class LineSearch(Rule):
    """AdamW at a rate that a backtracking line search finds (arXiv:2006.06835, eq. 4).

    The search goes along -gradient / (sqrt(v) + eps), from twice the last rate, and halves it
    until the batch's loss falls by c times the rate times the slope. c is that of arXiv:1905.09997.
    Where the learning rate is wrong by some factor, the search starts off by it.
    """

    finds_rate = True
    c, shrink, grow, most = 0.1, 0.5, 2.0, 30

    def make(self, lr: float) -> torch.optim.Optimizer:
        self.rate = 1.0
        return super().make(1.0)

    def step(self, loss: Tensor, closure: Callable[[], Tensor]) -> None:
        factor = self.optimizer.param_groups[0]["lr"]  # 1, but for what a situation does to it
        params = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad for p in params]
        direction = self._preconditioned(params)
        slope = -sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
        kept = [t.clone() for t in (*params, *self.model.buffers())]
        start, halvings = min(1.0, self.rate * self.grow) * factor, 0
        rate = start
        with torch.no_grad():
            while halvings < self.most:
                torch._foreach_add_(params, direction, alpha=-rate)
                reached = float(closure())
                torch._foreach_copy_([*params, *self.model.buffers()], kept)
                if reached <= float(loss) + self.c * rate * slope:
                    break
                rate, halvings = rate * self.shrink, halvings + 1
        self.rate = min(1.0, rate)
        self.touched += halvings > 0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _preconditioned(self, params: list[Tensor]) -> list[Tensor]:
        """Return gradient / (sqrt(v) + eps) with the v of the step that is about to be made."""
        found, beta = [], self.betas[1]
        for param in params:
            state = self.optimizer.state.get(param) or {"step": 0, "exp_avg_sq": 0.0}
            square = beta * state["exp_avg_sq"] + (1 - beta) * param.grad.square()
            correction = 1 - beta ** (float(state["step"]) + 1)
            found.append(param.grad / ((square / correction).sqrt() + 1e-8))
        return found


class Packaged(Rule):
    """An optimizer of a package, which does not tell which steps it changed."""

    def __init__(self, model: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(model, lr, betas)
        self.touched = None

    def make(self, lr: float) -> torch.optim.Optimizer:
        return self.kind()(
            self.model.parameters(), lr=lr, betas=self.betas, weight_decay=WEIGHT_DECAY
        )

    def kind(self) -> Callable[..., torch.optim.Optimizer]:
        raise NotImplementedError


class Stable(Packaged):
    """AdamW with update clipping, RMS of gradient over sqrt(v) at most 1 (arXiv:2304.13013)."""

    def kind(self) -> Callable[..., torch.optim.Optimizer]:
        from optimi import StableAdamW

        return StableAdamW


class StableSPAM(Packaged):
    """Adaptive clipping of spikes and norms, momentum reset (arXiv:2502.17055)."""

    def kind(self) -> Callable[..., torch.optim.Optimizer]:
        from pytorch_optimizer import StableSPAM as Optimizer

        return Optimizer


class ScheduleFree(Packaged):
    """AdamW without a schedule (arXiv:2405.15682)."""

    def kind(self) -> Callable[..., torch.optim.Optimizer]:
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree

    def make(self, lr: float) -> torch.optim.Optimizer:
        optimizer = super().make(lr)
        optimizer.train()
        return optimizer

    def before_evaluation(self) -> None:
        self.optimizer.eval()


class Prodigy(Packaged):
    """A learning rate found by itself (arXiv:2306.06101)."""

    finds_rate = True

    def kind(self) -> Callable[..., torch.optim.Optimizer]:
        from prodigyopt import Prodigy as Optimizer

        return Optimizer

    def make(self, lr: float) -> torch.optim.Optimizer:
        return super().make(1.0)


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


RULES: dict[str, type[Rule]] = {
    "nothing": Rule,
    "clip_grad_norm_": Clip,
    "ZClip": ZClip,
    "AdaGC": AdaGC,
    "AGC": AGC,
    "update RMS": UpdateRMS,
    "StableAdamW": Stable,
    "Stable-SPAM": StableSPAM,
    "skip-step": SkipStep,
    "line search": LineSearch,
    "schedule-free": ScheduleFree,
    "Prodigy": Prodigy,
    "safestep, bound": Guarded,
    "safestep, certified": Certified,
    "safestep, decrease": Decrease,
    "safestep, set": Set,
    "Adadelta": Adadelta,
    "Adadelta, safestep": GuardedAdadelta,
    "schedule-free, safestep": GuardedScheduleFree,
}
_NEEDS = {
    "StableAdamW": "optimi",
    "Stable-SPAM": "pytorch_optimizer",
    "schedule-free": "schedulefree",
    "schedule-free, safestep": "schedulefree",
    "Prodigy": "prodigyopt",
}


def available() -> list[str]:
    """Return the names of the rules whose packages, and whose options of SafeStep, exist here."""
    known = inspect.signature(SafeStep).parameters
    return [
        name
        for name, rule in RULES.items()
        if (name not in _NEEDS or find_spec(_NEEDS[name]))
        and set(getattr(rule, "options", {})) <= set(known)
    ]
