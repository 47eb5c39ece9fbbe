"""Rows that weigh nothing in a recorded loss set no radius, wherever the weight is applied."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep

_random = torch.Generator().manual_seed(1)
WEIGHT = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1])
INPUTS = torch.randn(12, 6, generator=_random)
INPUTS[WEIGHT == 0] *= 30  # their logits move most
LABELS = torch.randint(0, 5, (12,), generator=_random)
MANY = functional.one_hot(LABELS, 5).float()
SOFT = 0.8 * MANY + 0.04


def picked(log_probabilities):
    return log_probabilities.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)


def changed_in_place(z):
    losses = functional.cross_entropy(z, LABELS, reduction="none")
    losses[WEIGHT == 0] = 0.0
    return losses.mean()


def chosen(z):
    losses = functional.cross_entropy(z, LABELS, reduction="none")
    return torch.where(WEIGHT > 0, losses, 0.0).sum()


BY_ROW = {
    "losses times a mask": lambda z: (
        functional.cross_entropy(z, LABELS, reduction="none") * WEIGHT
    ).mean(),
    "losses of some": lambda z: functional.cross_entropy(z, LABELS, reduction="none")[
        WEIGHT > 0
    ].mean(),
    "losses where": chosen,
    "log-probabilities of labels": lambda z: -(picked(z.log_softmax(-1)) * WEIGHT).mean(),
    "changed in place": changed_in_place,
    "log-sum-exp": lambda z: ((z.logsumexp(-1) - picked(z)) * WEIGHT).mean(),
    "focal": lambda z: (
        -(WEIGHT * (1 - picked(z.softmax(-1))) ** 2 * picked(z.log_softmax(-1))).mean()
    ),
    "divergences": lambda z: (
        functional.kl_div(z.log_softmax(-1), SOFT, reduction="none").sum(-1) * WEIGHT
    ).mean(),
    "classes second": lambda z: (
        functional.cross_entropy(z.T[None], LABELS[None], reduction="none") * WEIGHT
    ).mean(),
    "softmax over the first axis": lambda z: -(picked(z.T.log_softmax(0).T) * WEIGHT).mean(),
}


def binary_by_element(z):
    losses = functional.binary_cross_entropy_with_logits(z, MANY, reduction="none")
    return (losses * WEIGHT.unsqueeze(-1)).mean()


def signs_by_element(z):
    return -(functional.logsigmoid(z * (2 * MANY - 1)) * WEIGHT.unsqueeze(-1)).mean()


BY_ELEMENT = {"binary": binary_by_element, "sigmoids": signs_by_element}


def recorded_step(loss, *, steps=2, inputs=INPUTS, model=None, **options):
    """Return the guard and the logits' tangent of the last step, in float64 by hand."""
    torch.manual_seed(0)
    model = model or nn.Linear(6, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    guard = SafeStep(optimizer, model, action="monitor", **options)

    def step():
        return loss(model(inputs))

    before = model
    for _ in range(steps):
        before = copy.deepcopy(model).double()
        optimizer.zero_grad()
        guard.record(step)
        step().backward()
        optimizer.step()
    after = copy.deepcopy(model).double()
    with torch.no_grad():
        return guard, after(inputs.double()) - before(inputs.double())  # the model is linear


@pytest.mark.parametrize("estimator", ["jvp", "difference", "secant"])
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_that_weigh_nothing_do_not_count(name, estimator):
    guard, tangent = recorded_step(BY_ROW[name], estimator=estimator)

    rows = tangent[WEIGHT > 0]
    expected = float((rows.amax(-1) - rows.amin(-1)).max()) / math.pi
    # An exact tangent in float32; quotients of float32 differences.
    rel = 1e-5 if estimator == "jvp" else 2e-3
    assert guard.last.normalized_step == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_elements_that_weigh_nothing_do_not_count(name):
    guard, tangent = recorded_step(BY_ELEMENT[name])

    expected = float(tangent[WEIGHT > 0].abs().max()) / math.pi
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)


def test_the_rows_are_told_anew_in_every_call():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = SafeStep(optimizer, model, action="monitor")

    def step(weight):
        losses = functional.cross_entropy(model(INPUTS), LABELS, reduction="none")
        return (losses * weight).mean()

    for weight in (torch.ones(12), WEIGHT, 1 - WEIGHT):
        before = copy.deepcopy(model).double()
        optimizer.zero_grad()
        guard.record(step, weight)
        step(weight).backward()
        optimizer.step()

        with torch.no_grad():
            after = copy.deepcopy(model).double()
            rows = (after(INPUTS.double()) - before(INPUTS.double()))[weight > 0]
        expected = float((rows.amax(-1) - rows.amin(-1)).max()) / math.pi
        assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_weight_zero_does_not_count_until_it_has_one():
    torch.manual_seed(0)
    weights = []

    def loss(z):
        weight = 0.0 if len(weights) < 6 else 1.0
        main = functional.cross_entropy(z, LABELS)
        return main + weight * functional.cross_entropy(5 * z, LABELS)

    quiet, tangent = recorded_step(loss)
    expected = float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi
    weights += range(6)
    loud, louder = recorded_step(loss)
    expected_loud = 5 * float((louder.amax(-1) - louder.amin(-1)).max()) / math.pi

    assert quiet.last.normalized_step == pytest.approx(expected, rel=1e-5)
    assert loud.last.normalized_step == pytest.approx(expected_loud, rel=1e-5)


def test_rows_are_weighed_without_a_trace():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, inputs):
            self.calls += 1
            return super().forward(inputs) * (1 + 0.1 * self.calls)

    model = Counting(6, 5)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)

    recorded_step(BY_ROW["losses times a mask"], steps=3, model=model)
    for _ in range(3):
        optimizer.zero_grad()
        BY_ROW["losses times a mask"](plain(INPUTS)).backward()
        optimizer.step()

    assert model.calls == plain.calls
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
