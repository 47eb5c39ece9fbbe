"""Optimizers that pip has, imported where one is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .rule import WEIGHT_DECAY, Rule


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
