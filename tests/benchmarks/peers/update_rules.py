"""Rules that look at the step itself: a few lines each, from their papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .rule import Rule


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
