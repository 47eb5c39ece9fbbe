"""The default estimator spares what it can predict, and measures what it cannot."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep
from safestep.guard.predictor import NEAR


class Run:
    """Train a classifier with clipped gradients: neither their norm nor the step's can jump."""

    def __init__(self, *, is_told, lr=0.05, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.guard = SafeStep(self.optimizer, self.model, **options)
        self.is_told = is_told
        self.forward_calls, self.failing_calls = 0, ()

    def loss(self, inputs, labels):
        self.forward_calls += 1
        if self.forward_calls in self.failing_calls:
            raise KeyError("labels are gone")
        return cross_entropy(self.model(inputs), labels)

    def step(self, inputs, labels):
        self.optimizer.zero_grad()
        if self.is_told:
            self.guard.record(self.loss, inputs, labels)
        self.loss(inputs, labels).backward()
        for param in self.model.parameters():
            param.grad.div_(param.grad.norm())
        self.optimizer.step()
        return self.guard.last


def batch():
    return torch.randn(32, 6), torch.randint(4, (32,))


@pytest.fixture(params=[False, True], ids=["forward call", "recorded step"])
def run(request):
    run = Run(is_told=request.param)
    for _ in range(40):
        report = run.step(*batch())
    assert report.estimator == "predicted"
    return run


def test_most_steps_are_predicted_and_no_prediction_is_far_below_r(run, dense_normalized_step):
    predicted = 0
    for step in range(60):
        inputs, labels = batch()
        before = copy.deepcopy(run.model)
        report = run.step(inputs, labels)
        predicted += report.estimator == "predicted"
        if report.estimator == "predicted" and step % 6 == 0:
            r = dense_normalized_step(before, run.model, inputs)
            assert r < 2.5 * report.normalized_step

    assert predicted > 50


def test_a_batch_out_of_range_is_measured(run):
    inputs, labels = batch()

    assert run.step(30 * inputs, labels).estimator == "jvp"


def test_a_row_out_of_range_is_measured(run):
    inputs, labels = batch()
    inputs[3] *= 30

    assert run.step(inputs, labels).estimator == "jvp"


def test_a_long_step_is_measured_and_scaled(run):
    run.optimizer.param_groups[0]["lr"] *= 1000

    report = run.step(*batch())

    assert (report.estimator, report.status) == ("jvp", "clipped")


def test_a_batch_that_is_not_finite_is_skipped(run):
    inputs, labels = batch()
    inputs[3, 0] = torch.nan
    before = copy.deepcopy(run.model.state_dict())

    assert run.step(inputs, labels).status == "skipped"
    torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("is_told", [False, True], ids=["forward call", "recorded step"])
@pytest.mark.parametrize("copies", [True, False], ids=["copied", "computed ahead"])
def test_a_secant_suffices_where_r_is_well_below_the_limit(is_told, copies, dense_normalized_step):
    run = Run(is_told=is_told, max_normalized_step=0.15, copy=copies)
    secants = []
    for _ in range(150):
        inputs, labels = batch()
        before = copy.deepcopy(run.model)
        report = run.step(inputs, labels)
        if report.estimator == "secant":
            r = dense_normalized_step(before, run.model, inputs)
            assert report.normalized_step == pytest.approx(r, rel=0.05)
            secants.append(report.normalized_step)

    assert len(secants) > 10
    assert max(secants) <= NEAR * 0.15


def test_a_secant_near_the_limit_is_followed_by_an_exact_measurement():
    run = Run(is_told=True, max_normalized_step=0.1)
    again = []
    for _ in range(150):
        before = run.forward_calls
        report = run.step(*batch())
        if run.forward_calls - before == 1 + 3:  # the step's own, two of the secant, one exact
            again.append(report)
        assert report.estimator == "jvp" or report.normalized_step <= NEAR * 0.1

    again = again[3:]  # the first ones are checked by a difference, which is two calls as well
    assert again
    assert {report.estimator for report in again} == {"jvp"}
    assert min(report.normalized_step for report in again) > 0.95 * NEAR * 0.1


@pytest.mark.filterwarnings("ignore:SafeStep")  # of exact measurements, which raise as well
def test_a_secant_that_raises_is_followed_by_an_exact_measurement(dense_normalized_step):
    run = Run(is_told=True, max_normalized_step=0.1)
    for _ in range(20):
        run.step(*batch())
    rescued = 0
    for index in range(120):
        inputs, labels = batch()
        if index % 8 == 0:  # one failure alone: after several in a row, the guard waits
            run.failing_calls = (run.forward_calls + 2,)  # the step's own call, run again
        calls, before = run.forward_calls, copy.deepcopy(run.model)
        report = run.step(inputs, labels)
        if index % 8 == 0 and run.forward_calls - calls == 3:
            rescued += 1
            r = dense_normalized_step(before, run.model, inputs)
            assert report.estimator == "jvp"
            assert report.scale * report.normalized_step == pytest.approx(r, rel=1e-3)

    assert rescued
