"""Half precision that a call enters by itself: nothing around the call shows it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep

STEPS = 4


class Casting(nn.Sequential):
    """Runs in half precision, whoever calls it, and returns float32."""

    def forward(self, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(inputs).float()


def layers():
    return nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)


def autocast_inside(dtype):
    def step(model, inputs, target):
        with torch.autocast("cpu", dtype):
            return functional.cross_entropy(model(inputs), target)

    return step


def plain(model, inputs, target):
    return functional.cross_entropy(model(inputs), target)


def cast_by_hand(model, inputs, target):
    return functional.cross_entropy(model(inputs).half().float(), target)


CASES = {
    "recorded, bfloat16": (nn.Sequential, autocast_inside(torch.bfloat16), True, None),
    "recorded, float16": (nn.Sequential, autocast_inside(torch.float16), True, None),
    "recorded, cast": (nn.Sequential, cast_by_hand, True, None),
    "in forward": (Casting, plain, False, None),
    "in forward, told": (Casting, plain, False, lambda output: output),
}


@pytest.mark.parametrize("estimator", ["jvp", "difference", "secant"])
@pytest.mark.parametrize("case", CASES)
def test_a_call_that_enters_half_precision_is_measured_as_such(
    case, estimator, dense_normalized_step
):
    """A difference of float32's distance would be rounding alone, and count where it is larger."""
    make, step, is_recorded, logits = CASES[case]
    torch.manual_seed(0)
    model = make(*layers())
    inputs, target = torch.randn(12, 5), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = SafeStep(optimizer, model, action="monitor", estimator=estimator, logits=logits)
    for _ in range(STEPS):
        optimizer.zero_grad()
        before = copy.deepcopy(model)
        if is_recorded:
            guard.record(step, model, inputs, target)
        step(model, inputs, target).backward()
        optimizer.step()  # two estimators that differ would be a warning, here an error

        exact = [nn.Sequential(*copy.deepcopy(each)).double() for each in (before, model)]
        expected = dense_normalized_step(*exact, inputs)
        # The difference is the coarsest, see its docstring.
        rel = 0.15 if estimator == "difference" else 0.05
        assert math.isclose(guard.last.normalized_step, expected, rel_tol=rel)
        assert guard.last.estimator == estimator


class Tanh(torch.autograd.Function):
    """Has a backward pass and no forward-mode derivative; bounded, so that far steps saturate."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs.tanh())
        return inputs.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].square())


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.norm, self.head = nn.Linear(10, 64), nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, inputs):
        return self.head(self.norm(Tanh.apply(self.hidden(inputs))))


@pytest.mark.parametrize("lr", [0.01, 0.1, 1.0, 3.0], ids=str)
@pytest.mark.filterwarnings("ignore:SafeStep. .*no forward-mode derivative")
def test_a_step_far_over_the_radius_is_measured_with_half_precision_parameters(lr):
    model = Bounded().bfloat16()
    before = copy.deepcopy(model).double()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    guard = SafeStep(optimizer, model, action="monitor")
    inputs = torch.randn(32, 10, generator=torch.Generator().manual_seed(1)).bfloat16()
    functional.cross_entropy(model(inputs).float(), torch.arange(32) % 8).backward()
    optimizer.step()

    params = list(before.parameters())
    starts = [param.detach().clone() for param in params]
    ends = []
    for share in (1e-7, -1e-7):
        for param, start, end in zip(params, starts, model.parameters(), strict=True):
            param.data = start + share * (end.detach().double() - start)
        ends.append(before(inputs.double()).detach())
    tangent = (ends[0] - ends[1]) / 2e-7
    expected = float((tangent.amax(-1) - tangent.amin(-1)).max()) / torch.pi
    assert guard.last.estimator.startswith("difference")
    assert guard.last.normalized_step == pytest.approx(expected, rel=0.1)
