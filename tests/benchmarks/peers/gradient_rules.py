"""Rules that look at the gradient, and at the loss: a few lines each, from their papers."""

from __future__ import annotations

import math
import statistics
from collections import deque

import torch
from torch import Tensor, nn

from .rule import Rule


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
