"""Classes that a mask takes out of a softmax set no radius, however the mask is written."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.capture.temperature import label_temperature
from safestep.radius.bounds import certified_radius
from safestep.radius.masking import absent_classes, without_absent

ALLOWED = torch.arange(7) < torch.tensor([[3], [6], [5], [4], [3]])  # of a pointer or of actions
LABELS = torch.tensor([0, 5, 4, 2, 1])
FILLS = [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4]


class Pointer(nn.Module):
    """Scores of places, of which each example has some; a common bias decays and moves them all."""

    def __init__(self, fill):
        super().__init__()
        self.score, self.bias = nn.Linear(4, 7, bias=False), nn.Parameter(torch.full((1,), 50.0))
        self.fill = fill

    def forward(self, inputs):
        return (self.score(inputs) + self.bias).masked_fill(~ALLOWED, self.fill)


def take_step(fill, how, **options):
    """Return the guard and r of the places that exist, in float64 and by hand."""
    torch.manual_seed(0)
    model, inputs = Pointer(fill), torch.randn(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1.0)
    guard = SafeStep(optimizer, model, action="monitor", **options)
    before = [p.detach().double().clone() for p in model.parameters()]

    def step():
        return functional.cross_entropy(model(inputs), LABELS)

    if how == "record":
        guard.record(step)
    step().backward()
    optimizer.step()

    moved = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
    bias, weight = sorted(moved, key=torch.numel)
    tangent = inputs.double() @ weight.T + bias
    rows = [row[allowed] for row, allowed in zip(tangent, ALLOWED, strict=True)]
    return guard, max(float(row.max() - row.min()) for row in rows) / math.pi


@pytest.mark.filterwarnings("ignore:SafeStep. output is taken for the logits")
@pytest.mark.parametrize("how", ["loop", "record"])
@pytest.mark.parametrize("estimator", ["jvp", "difference", "secant"])
@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_masked_classes_do_not_set_the_radius(fill, estimator, how):
    guard, expected = take_step(fill, how, estimator=estimator)

    assert guard.last.status == "ok"
    # Of -1e4, 2 pi / 1e4 of the distance to the others is left; differences are of float32.
    rel = 1e-2 if estimator != "jvp" else 1e-2 if fill == -1e4 else 1e-5
    assert guard.last.normalized_step == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_certified_radius_of_masked_classes_is_at_least_the_bound_of_the_others(fill):
    guard, expected = take_step(fill, "record", radius="certified")

    assert guard.last.normalized_step <= expected * (1 + 1e-3)


@pytest.mark.parametrize("fill", FILLS[1:3], ids=str)
def test_estimators_are_compared_where_a_mask_is_a_huge_number(fill):
    """Rounding of 1e9 would excuse any disagreement."""
    torch.manual_seed(0)
    model, inputs = Pointer(fill), torch.randn(5, 4)
    kept = model.score.weight.data.t()  # out of reach: forward mode cannot see it move
    model.register_forward_hook(lambda module, args, output: output + 20 * args[0] @ kept)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model, action="monitor", logits=lambda output: output)

    functional.cross_entropy(model(inputs), LABELS).backward()
    with pytest.warns(UserWarning, match="two estimators of one step differ"):
        optimizer.step()

    assert "jvp r" in guard.last.estimator


@pytest.mark.parametrize("temperature", [1.0, 3.0], ids=str)
def test_temperature_is_read_from_rows_with_masked_classes(temperature):
    logits = 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    logits = logits.masked_fill(~ALLOWED, -math.inf).requires_grad_()
    loss = functional.cross_entropy(logits / temperature, LABELS)

    found = label_temperature(logits, *torch.autograd.grad(loss, logits))

    assert found == pytest.approx(temperature, rel=1e-3)


@pytest.mark.parametrize("depth", [1001.0, 1e4], ids=str)
@pytest.mark.parametrize("slopes", [(0, 1, 3, -40), (1, 1, 1, 5), (0, 1, 2, 5000)], ids=str)
def test_radius_without_an_absent_class_is_within_the_zeros_of_all(slopes, depth):
    """Zeros of sum_k w_k exp(a_k t) by numpy.roots, in scaled numbers: exp(-depth) has no float."""
    logits = torch.tensor([[0.3, -0.2, 0.1, -depth]], dtype=torch.float64)
    tangent = torch.tensor([slopes], dtype=torch.float64)

    adjusted = without_absent(logits, tangent)

    spread = (adjusted.amax(-1) - adjusted.amin(-1)).item()
    # Where the absent class balances the heaviest of the others, the first zero with it can lie.
    distance = [abs(slopes[3] - a) for a in slopes[:3]]
    with_absent = (depth - math.log(3)) / max(distance)
    shifted = np.array(slopes[:3]) - min(slopes[:3])
    polynomial = np.zeros(shifted.max() + 1)
    np.add.at(polynomial, shifted, logits[0, :3].exp().numpy())
    roots = np.roots(polynomial[::-1]).astype(complex)
    without = np.abs(np.log(roots)).min() if len(roots) else math.inf
    assert math.pi / spread <= min(with_absent, without)


def test_rows_without_masks_are_returned_as_they_are():
    logits, tangent = torch.randn(2, 3, 4)

    assert without_absent(logits, tangent) is tangent
    assert without_absent(logits * math.nan, tangent) is tangent


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_a_row_without_any_class_sets_no_radius(fill):
    logits = torch.tensor([[0.0, 2.0, 1.0], [-math.inf] * 3, [0.0, fill, 1.0]])
    tangent = torch.tensor([[1.0, 2.0, 0.0], [math.nan, 5.0, 7.0], [4.0, 9.0, 4.0]])

    adjusted = without_absent(logits, tangent)

    spread = adjusted.amax(-1) - adjusted.amin(-1)
    assert torch.equal(spread[:2], torch.tensor([2.0, 0.0]))
    assert spread[2] <= 5 * 2 * math.pi / 1e4 * (1 + 1e-3)
    # And by the same rule where a radius takes logits -inf itself.
    assert certified_radius(logits, tangent)[1] == math.inf


def test_not_a_number_is_not_absent():
    logits = torch.tensor([[0.0, math.nan, -1e9]])

    assert absent_classes(logits) is None or not absent_classes(logits)[0, 1]
