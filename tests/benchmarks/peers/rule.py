"""What bench_peers.py compares: a rule makes the steps of a training out of AdamW's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
