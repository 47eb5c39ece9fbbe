"""A part of a batch stands in for all of it where its examples are seen to be independent."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep, logit_spread, logits_jvp
from safestep.guard.predictor import FIRST_EXACT
from safestep.measure.part_of_batch import PartOfBatch
from safestep.radius.batch import BatchRule, LogitTangent

CLASSES = 5
# The first rows of one mask are the same for fewer rows; those of the second are not.
TWO_MASKS = nn.Sequential(nn.Dropout(0.3), nn.Linear(32, 32), nn.Dropout(0.3))


class Scaled(nn.Module):
    """A model that takes keyword arguments, one of them not along the batch."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, inputs, *, scale):
        return self.body(inputs) * scale


def perceptron(*middle):
    return nn.Sequential(nn.Linear(6, 32), *middle, nn.Tanh(), nn.Linear(32, CLASSES))


def train(model, steps, *, r, size=64, **arguments):
    """Train with steps of about a given r; return the reports with the exact r of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    guard = SafeStep(optimizer, model, action="monitor")
    found = []
    for step in range(steps):
        inputs, labels = torch.randn(size, 6), torch.randint(CLASSES, (size,))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        cross_entropy(model(inputs, **arguments), labels).backward()
        optimizer.step()
        after = dict(model.named_parameters())
        update = {name: after[name].detach() - start for name, start in before.items()}
        state = {name: p.detach().clone() for name, p in after.items()}
        model.load_state_dict(before, strict=False)
        _, tangent = logits_jvp(model, update, inputs, **arguments)
        model.load_state_dict(state, strict=False)
        exact = float(logit_spread(tangent).max()) / math.pi
        found.append((guard.last, exact))
        optimizer.param_groups[0]["lr"] *= r / exact if step < FIRST_EXACT else 1.0
    guard.detach()
    return found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("form", ["positional", "keywords"])
def test_estimate_is_near_the_exact_r_and_says_how_many_examples(form):
    model, arguments = perceptron(), {}
    if form == "keywords":
        model, arguments = Scaled(model), {"scale": torch.ones(CLASSES)}

    found = train(model, 60, r=0.3, **arguments)

    sampled = [(report, exact) for report, exact in found if report.estimator == "sampled 8/64"]
    assert len(sampled) >= 3
    ratios = [report.normalized_step / exact for report, exact in sampled]
    assert 0.6 < statistics.median(ratios) < 1.7
    assert min(ratios) > 0.4
    assert max(ratios) < 2.5


def test_sampled_rows_are_those_of_the_first_examples():
    model = perceptron()

    found = train(model, 40, r=0.3)

    sampled = [report for report, _ in found if report.estimator.startswith("sampled")]
    assert sampled
    assert {report.bottleneck for report in sampled} <= set(range(8))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(32), TWO_MASKS], ids=["norm", "dropout"])
def test_examples_that_depend_on_each_other_are_measured_together(layer):
    model = perceptron(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    guard = SafeStep(optimizer, model, action="monitor")
    used = set()
    for _ in range(40):
        optimizer.zero_grad()
        inputs, labels = torch.randn(16, 6), torch.randint(CLASSES, (16,))
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        used.add(guard.last.estimator.split(" ")[0])
    assert "sampled" not in used
    assert "jvp" in used


def test_batch_too_small_to_cut_is_measured_whole():
    found = train(perceptron(), 40, r=0.3, size=6)

    assert not any(report.estimator.startswith("sampled") for report, _ in found)


def test_batch_whose_examples_differ_too_much_is_measured_whole():
    model = nn.Linear(6, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = SafeStep(optimizer, model, action="monitor")
    used = set()
    for step in range(40):
        inputs, labels = torch.randn(64, 6), torch.randint(CLASSES, (64,))
        inputs[8 if step % 4 == 3 else 0] *= 10  # sets r, in the part or outside it
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        used.add(guard.last.estimator.split(" ")[0])
    assert "sampled" not in used


def test_state_comes_back():
    one, other = PartOfBatch(), PartOfBatch()
    rows = [LogitTangent("output", torch.zeros(16, 2), torch.eye(16)[:, :2] + torch.ones(16, 1))]
    update = SimpleNamespace(is_sharded=False, calls=[SimpleNamespace(num_examples=16)])
    for _ in range(4):
        whole = BatchRule().reduce(one.noting(rows, update))
        first = one.learn(whole)
        if one.is_due(first):
            one.compare(first, first, 0.0)
    assert one.can_tell(update)

    other.load_state_dict(one.state_dict())

    assert other.can_tell(update)
    assert other.state_dict() == one.state_dict()


def test_batch_that_is_shorter_once_is_measured_all_the_same():
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    guard = SafeStep(optimizer, model, action="monitor")
    for step in range(40):
        size = 3 if step == 30 else 16
        optimizer.zero_grad()
        inputs, labels = torch.randn(size, 6), torch.randint(CLASSES, (size,))
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        assert guard.last.status == "ok", guard.last
        assert math.isfinite(guard.last.normalized_step)


def test_training_is_bitwise_the_same_while_parts_are_measured():
    def parameters(is_guarded):
        torch.manual_seed(1)
        model = perceptron()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        guard = SafeStep(optimizer, model) if is_guarded else None
        used = set()
        for _ in range(40):
            optimizer.zero_grad()
            inputs, labels = torch.randn(64, 6), torch.randint(CLASSES, (64,))
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            used.add(None if guard is None else guard.last.estimator.split(" ")[0])
        assert ("sampled" in used) == is_guarded
        return list(model.parameters())

    for one, other in zip(parameters(True), parameters(False), strict=True):
        assert torch.equal(one, other)
