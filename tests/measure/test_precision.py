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
