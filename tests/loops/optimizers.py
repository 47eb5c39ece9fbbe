"""Optimizers of the loops: torch's own in every variant, and those that people install."""

import pytest
import torch
from torch import optim


class Lion(optim.Optimizer):
    """The sign of an interpolated momentum."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                param.add_(momentum.lerp(param.grad, 0.1).sign_(), alpha=-group["lr"])
                momentum.lerp_(param.grad, 0.01)


class Lamb(optim.Optimizer):
    """Adam whose step has the length of each layer's parameters."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(mean=torch.zeros_like(param), square=torch.zeros_like(param))
                state["mean"].lerp_(param.grad, 0.1)
                state["square"].lerp_(param.grad.square(), 0.01)
                step = state["mean"] / (state["square"].sqrt() + 1e-6)
                trust = param.norm() / step.norm() if param.norm() > 0 else 1.0
                param.sub_(step * trust, alpha=group["lr"])


class MuonAndAdamW(optim.Optimizer):
    """Muon for the matrices, AdamW for the rest, as one optimizer."""

    def __init__(self, params, lr):
        params = list(params)
        self.parts = [
            optim.Muon([p for p in params if p.ndim == 2], lr=lr),
            optim.AdamW([p for p in params if p.ndim != 2], lr=lr),
        ]
        super().__init__(params, {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()


def _package(module, name, **options):
    """Return what makes an optimizer of a package; a test skips where it is not installed."""

    def make(params, lr):
        found = getattr(pytest.importorskip(module), name)
        return found(params, lr=lr, **options)

    return make


def _around(module, name, base):
    def make(params, lr):
        return getattr(pytest.importorskip(module), name)(base(params, lr=lr))

    return make


OPTIMIZERS = {
    "SGD": optim.SGD,
    "SGD foreach": lambda p, lr: optim.SGD(p, lr, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p, lr: optim.SGD(p, lr, momentum=0.9, fused=True),
    "Adam amsgrad": lambda p, lr: optim.Adam(p, lr, amsgrad=True),
    "AdamW": optim.AdamW,
    "AdamW foreach": lambda p, lr: optim.AdamW(p, lr, foreach=True),
    "AdamW fused": lambda p, lr: optim.AdamW(p, lr, fused=True),
    "AdamW tensor lr": lambda p, lr: optim.AdamW(p, torch.tensor(lr)),
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "RMSprop": optim.RMSprop,
    "Adagrad": optim.Adagrad,
    "Adafactor": optim.Adafactor,
    "Lion": Lion,
    "LAMB": Lamb,
    "Muon + AdamW": MuonAndAdamW,
    "prodigyopt.Prodigy": _package("prodigyopt", "Prodigy", d0=1e-3),
    "pytorch_optimizer.SOAP": _package("pytorch_optimizer", "SOAP"),
    "pytorch_optimizer.Lamb": _package("pytorch_optimizer", "Lamb"),
    "pytorch_optimizer.AdEMAMix": _package("pytorch_optimizer", "AdEMAMix"),
    "pytorch_optimizer.FTRL": _package("pytorch_optimizer", "FTRL"),
    "pytorch_optimizer.Lookahead": _around("pytorch_optimizer", "Lookahead", optim.AdamW),
    "lion_pytorch.Lion": _package("lion_pytorch", "Lion"),
    "schedulefree.AdamW": _package("schedulefree", "AdamWScheduleFree"),
    "schedulefree.SGD": _package("schedulefree", "SGDScheduleFree"),
    "schedulefree.RAdam": _package("schedulefree", "RAdamScheduleFree"),
    "schedulefree.ScheduleFreeWrapper": _around("schedulefree", "ScheduleFreeWrapper", optim.SGD),
    "optimi.AdamW": _package("optimi", "AdamW"),
    "optimi.Ranger": _package("optimi", "Ranger"),
}
