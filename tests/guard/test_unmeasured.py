"""Steps that are known to stay unmeasured: what they cost, and what still holds."""

from copy import deepcopy
from math import isnan

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from safestep import SafeStep

pytestmark = pytest.mark.filterwarnings("ignore:SafeStep")
LABELS = torch.arange(8) % 5


def squared(output):
    return mse_loss(output, torch.ones_like(output))


class Loop:
    """Train a small model on random inputs."""

    def __init__(self, optimizer=torch.optim.Adam, guarded=True, copy=True):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        self.guard = SafeStep(self.optimizer, self.model, copy=copy) if guarded else None

    def step(self, loss=squared):
        self.optimizer.zero_grad()
        loss(self.model(torch.randn(8, 4))).backward()
        self.optimizer.step()

    def rest(self):
        """Go on until nothing is copied any more."""
        for _ in range(10):
            self.step()
        assert self.is_resting

    @property
    def is_resting(self):
        """Whether the last step was not copied: its distance is not known."""
        return self.guard.last.status == "unmeasured" and isnan(self.guard.last.step_norm)

    def state(self):
        return deepcopy((self.model.state_dict(), self.optimizer.state_dict()["state"]))


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adadelta", "Adagrad"])
def test_rested_steps_are_bitwise_the_optimizers_own(name):
    loops = [Loop(getattr(torch.optim, name), guarded) for guarded in (False, True)]
    for loop in loops:
        torch.manual_seed(1)
        for _ in range(60):
            loop.step()

    assert_same(loops[0].state(), loops[1].state())
    report = loops[1].guard.last
    assert (report.step, report.status, report.scale) == (59, "unmeasured", 1.0)
    assert "softmax" in report.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8])
def test_a_gradient_that_is_not_finite_is_skipped_and_one_that_is_huge_is_copied(value):
    loop = Loop()
    loop.rest()
    before = loop.state()

    loop.step(lambda output: mse_loss(output, torch.full_like(output, value)))

    if value == 1e8:
        assert loop.guard.last.status == "unmeasured"
        assert loop.guard.last.step_norm > 0  # it was copied, as its distance is known
    else:
        assert loop.guard.last.status == "skipped"
        assert "the gradient is not finite: 0.weight" in loop.guard.last.reason
        assert_same(loop.state(), before)
    loop.step()
    assert loop.guard.last.status == "unmeasured"
    assert loop.is_resting


def test_a_rate_that_is_not_finite_makes_no_step():
    loop = Loop()
    loop.rest()
    before = loop.state()
    loop.optimizer.param_groups[0]["lr"] = float("inf")

    loop.step()

    assert loop.guard.last.status == "skipped"
    assert_same(loop.state(), before)


def test_another_loss_is_measured_at_once_each_time():
    loop = Loop()
    loop.rest()
    loop.optimizer.param_groups[0]["lr"] = 1e3  # as the loss changes

    loop.step(lambda output: cross_entropy(output, LABELS))

    assert loop.guard.last.status == "clipped"
    loop.optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(3):
        for _ in range(12):
            loop.step()
        loop.step(lambda output: cross_entropy(output, LABELS))
        assert loop.guard.last.status == "ok"


def test_another_loss_in_one_micro_batch_of_two_is_seen():
    loop = Loop()
    loop.rest()

    loop.optimizer.zero_grad()
    squared(loop.model(torch.randn(8, 4))).backward()
    cross_entropy(loop.model(torch.randn(8, 4)), LABELS).backward()
    loop.optimizer.step()

    assert not loop.is_resting


def test_large_outputs_rest_and_wake_too():
    model = nn.Linear(4, 700)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard, labels = SafeStep(optimizer, model), torch.arange(100)
    for step in range(20):
        optimizer.zero_grad()
        output = model(torch.randn(100, 4))
        (squared(output) if step < 19 else cross_entropy(output, labels)).backward()
        optimizer.step()
        assert isnan(guard.last.step_norm) == (8 <= step < 19)
    assert guard.last.status == "ok"


def by_closure(loop, loss):
    """Take a step whose loss is computed by a closure, as under Lightning."""

    def closure():
        loop.optimizer.zero_grad()
        value = loss(loop.model(torch.randn(8, 4)))
        value.backward()
        return value

    loop.optimizer.step(closure)


@pytest.mark.parametrize("copy", [True, False])
def test_steps_by_a_closure_rest_too(copy):
    loops = [Loop(guarded=False), Loop(copy=copy)]
    for loop in loops:
        torch.manual_seed(1)
        for _ in range(30):
            by_closure(loop, squared)
    assert loops[1].is_resting
    assert_same(loops[0].state(), loops[1].state())


@pytest.mark.parametrize("copy", [True, False])
def test_a_closure_of_another_loss_is_measured_at_once_and_one_that_is_not_finite_skipped(copy):
    loop = Loop(copy=copy)
    loop.rest()
    before = loop.state()
    by_closure(loop, lambda output: mse_loss(output, torch.full_like(output, torch.nan)))
    assert loop.guard.last.status == "skipped"
    assert_same(loop.state(), before)

    by_closure(loop, squared)
    assert loop.is_resting
    loop.optimizer.param_groups[0]["lr"] = 1e3
    by_closure(loop, entropy)
    assert loop.guard.last.status == "clipped"
    assert loop.guard.last.scale * loop.guard.last.normalized_step == pytest.approx(1)


def test_a_closure_that_raises_leaves_the_next_step_right():
    loop = Loop()
    loop.rest()

    def closure():
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        loop.optimizer.step(closure)
    by_closure(loop, squared)
    assert loop.is_resting
    by_closure(loop, entropy)
    assert loop.guard.last.status == "ok"


def test_an_optimizer_that_mixes_elements_does_not_rest():
    class Mixing(torch.optim.SGD):
        pass

    other = Loop(Mixing)
    for _ in range(20):
        other.step()
    assert not other.is_resting
    assert other.guard.last.step_norm > 0


def test_validation_passes_and_outputs_without_gradients_are_no_other_loss():
    loop = Loop()
    loop.rest()
    for _ in range(3):
        with torch.no_grad():
            loop.model(torch.randn(3, 4))
        loop.model(torch.randn(3, 4))  # with a graph that nobody uses
        loop.step()
        assert loop.is_resting


def train(guarded, losses, rate=1e-2):
    """Return estimator and status of every step."""
    loop, told = Loop(guarded=guarded), []
    loop.optimizer.param_groups[0]["lr"] = rate
    for loss in losses:
        loop.step(loss)
        told.append((loop.guard.last.estimator, loop.guard.last.status) if guarded else None)
    return loop, told


def entropy(output):
    return cross_entropy(output, LABELS)


def test_another_loss_ends_the_predictions_at_its_first_step():
    losses = [entropy] * 60 + [squared] * 3 + [entropy] * 2
    loop, told = train(True, losses, rate=1e-4)
    assert told[59] == ("predicted", "ok")
    assert [status for _, status in told[60:63]] == ["unmeasured"] * 3
    assert told[63][0] != "predicted"  # what was measured before is out of date
    assert told[63][1] == "ok"
    assert_same(loop.state(), train(False, losses, rate=1e-4)[0].state())


def test_a_loss_of_two_forms_is_measured_once_for_each():
    def other(output):
        return entropy(output) + 1e-3 * output.square().mean()

    _, told = train(True, ([entropy] * 3 + [other]) * 20, rate=1e-4)
    assert told[40:].count(("predicted", "ok")) > 36


def test_forms_of_a_loss_without_end_are_not_measured_each():
    def of_form(number):
        chain = [torch.sin, torch.cos, torch.tanh, torch.exp, torch.atan, torch.sigmoid]

        def loss(output):
            extra = output.mean()
            for bit, function in enumerate(chain):
                extra = function(extra) if number >> bit & 1 else extra
            return entropy(output) + 1e-4 * extra

        return loss

    _, told = train(True, map(of_form, range(1, 64)), rate=1e-4)
    assert told[50:].count(("predicted", "ok")) > 8


def test_the_losses_that_are_known_go_on_in_a_resumed_run():
    loop, _ = train(True, [entropy] * 60, rate=1e-4)
    state = deepcopy(loop.guard.state_dict())
    loop.guard.detach()
    loop.guard = SafeStep(loop.optimizer, loop.model)
    loop.guard.load_state_dict(state)
    loop.step(entropy)
    assert loop.guard.last.estimator == "predicted"
    loop.step(squared)
    assert loop.guard.last.status == "unmeasured"


def test_gradients_of_a_loss_that_rests_are_not_kept():
    loop = Loop()
    loop.rest()
    loop.optimizer.zero_grad()
    squared(loop.model(torch.randn(8, 4))).backward()
    (call,) = loop.guard._recorder.take()
    assert call.is_resting
    assert not call.unread
    assert not call.kept.sums


def test_another_loss_in_a_recorded_step_is_noticed_at_once():
    """As under Lightning, where the guard sees no output of the model."""
    loop, loss = Loop(), squared

    def training_step(inputs):
        return loss(loop.model(inputs))

    def step():
        loop.optimizer.zero_grad()
        inputs = torch.randn(8, 4)
        loop.guard.record(training_step, inputs)
        training_step(inputs).backward()
        loop.optimizer.step()
        return loop.guard.last.estimator, loop.guard.last.status

    for _ in range(12):
        step()
    assert loop.is_resting
    loss, loop.optimizer.param_groups[0]["lr"] = entropy, 1e3
    assert step()[1] == "clipped"
    loop.optimizer.param_groups[0]["lr"] = 1e-4
    assert [step() for _ in range(60)][-1] == ("predicted", "ok")
    loss = squared
    assert [step()[1] for _ in range(2)] == ["unmeasured"] * 2
    loss = entropy
    assert step()[0] != "predicted"


def test_another_loss_of_large_outputs_is_not_read_as_the_one_before():
    torch.manual_seed(0)
    model = nn.Linear(4, 700)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    guard, labels = SafeStep(optimizer, model), torch.arange(100)
    statuses = []
    for step in range(66):
        optimizer.zero_grad()
        output = model(torch.randn(100, 4))
        loss = cross_entropy(output, labels) if step < 60 or step > 63 else output.square().mean()
        loss.backward()
        optimizer.step()
        statuses.append(guard.last.status)
    assert statuses == ["ok"] * 60 + ["unmeasured"] * 4 + ["ok"] * 2
