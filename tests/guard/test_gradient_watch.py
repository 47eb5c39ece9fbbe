"""Faults in a gradient are named once, and nothing else is taken for one."""

import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.guard.gradient_watch import GradientWatch
from safestep.guard.health import Health
from safestep.measure.slopes import Slopes
from safestep.measure.update import Estimator, Measurement, Update

FAULTY_FROM = 20


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5))


def watched(tmp_path, change, *, steps=40, loss=None, model=None, **options):
    """Train with `change(model, step)` before each step; return the guard's reports and events."""
    model = network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reports = []
    with SafeStep(optimizer, model, audit_interval=1, run_dir=tmp_path, **options) as guard:
        for step in range(steps):
            inputs, labels = torch.randn(32, 6), torch.randint(5, (32,))
            optimizer.zero_grad()
            value = functional.cross_entropy(model(inputs), labels)
            (value if loss is None else value + loss(model)).backward()
            change(model, step)
            optimizer.step()
            reports.append(guard.last)
    records = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    return reports, [record for record in records if record.get("name") == "gradient"]


def scaled(model, factor):
    for param in model.parameters():
        param.grad.mul_(factor)


def half_a_tile(model):
    model[0].weight.grad[:4, :3] = 0


def one_layer(model):
    model[0].weight.grad *= 1.1


def doubled_entry(model):
    model[0].weight.grad.view(-1)[model[0].weight.grad.abs().argmax()] *= 2


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (lambda model: scaled(model, 1.05), "the whole gradient is 1.05 times"),
        (one_layer, "0.weight differs most"),
        (half_a_tile, "0.weight differs most"),
        (doubled_entry, "0.weight differs most"),
    ],
    ids=["whole", "layer", "tile", "entry"],
)
def test_a_fault_is_warned_of_once_with_its_place_and_its_step(tmp_path, fault, cause):
    def change(model, step):
        if step >= FAULTY_FROM:
            fault(model)

    with pytest.warns(UserWarning, match="gradient does not match the loss") as seen:
        _, events = watched(tmp_path, change)

    assert len(seen) == 1
    (event,) = events
    assert event["since"] == FAULTY_FROM
    assert f"since step {FAULTY_FROM} (" in event["message"]
    assert cause in event["message"]
    assert f"it matched at step {FAULTY_FROM - 1}" in event["message"]


def test_the_end_of_a_fault_is_told_too(tmp_path):
    def change(model, step):
        if FAULTY_FROM <= step < FAULTY_FROM + 5:
            scaled(model, 1.05)

    with pytest.warns(UserWarning, match="ratio 1.05 since step 20"):
        _, (_, end) = watched(tmp_path, change)

    assert (end["step"], end["since"]) == (FAULTY_FROM + 5, FAULTY_FROM)
    assert "matches the loss again" in end["message"]


@pytest.mark.parametrize("begins", [0, FAULTY_FROM])
@pytest.mark.parametrize(
    "clip",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
        lambda model: [nn.utils.clip_grad_norm_([param], 0.05) for param in model.parameters()],
    ],
    ids=["norm", "value", "layer norms"],
)
def test_clipping_is_no_fault_and_its_factor_is_reported(tmp_path, clip, begins):
    def change(model, step):
        if step >= begins:
            clip(model)

    reports, events = watched(tmp_path, change)

    assert not events
    ratios = [report.gradient_ratio for report in reports]
    assert ratios[:begins] == pytest.approx([1.0] * begins, rel=1e-3)
    assert 0 < sorted(ratios[begins:])[len(ratios[begins:]) // 2] < 0.95


def test_a_gradient_that_is_always_shorter_by_one_factor_is_a_fault(tmp_path):
    def change(model, step):
        if step >= FAULTY_FROM:
            scaled(model, 0.9)

    with pytest.warns(UserWarning, match="shorter by one factor"):
        _, (event,) = watched(tmp_path, change)

    assert event["step"] == FAULTY_FROM + 2


def test_a_loss_with_terms_outside_of_the_outputs_is_not_audited(tmp_path):
    def penalty(model):
        return 0.1 * sum(param.square().sum() for param in model.parameters())

    with pytest.warns(UserWarning, match="the gradient is not audited"):
        reports, (event,) = watched(tmp_path, lambda *_: None, loss=penalty)

    assert all(math.isnan(report.gradient_ratio) for report in reports)
    assert all("terms that do not pass through" in report.gradient_reason for report in reports)
    assert event["step"] == 0


class Scaled(torch.autograd.Function):
    """Does nothing, with the right derivative forwards and `factor` times that backwards."""

    factor = 1.0

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return Scaled.factor * gradients[0]

    @staticmethod
    def jvp(ctx, *tangents):
        return tangents[0].clone()


class WrongBackwards(nn.Module):
    def forward(self, inputs):
        return Scaled.apply(inputs)


def test_a_backward_function_that_is_wrong_from_some_step_on_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(Scaled, "factor", 1.0)

    def change(model, step):
        Scaled.factor = 1.0 if step < FAULTY_FROM else 1.3

    model = network().insert(2, WrongBackwards())
    with pytest.warns(UserWarning, match="a second backward pass gives the same gradient"):
        _, (event,) = watched(tmp_path, change, model=model)

    assert event["since"] == FAULTY_FROM + 1  # the first backward pass with another factor


def test_a_hook_that_changes_the_gradient_from_some_step_on_is_named_as_a_change(tmp_path):
    model, state = network(), {"factor": 1.0}
    model[2].register_full_backward_hook(lambda *args: (args[1][0] * state["factor"],))

    def change(model, step):
        state["factor"] = 1.0 if step < FAULTY_FROM else 1.3

    with pytest.warns(UserWarning, match="differs most from a second backward pass.*a hook"):
        _, (event,) = watched(tmp_path, change, model=model)

    assert event["since"] == FAULTY_FROM + 1


def test_clean_training_raises_no_alarm(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports, events = watched(tmp_path, lambda *_: None, steps=300)

    assert not events
    assert [report.gradient_ratio for report in reports] == pytest.approx([1.0] * 300, rel=1e-3)


def test_audits_leave_training_bitwise_as_it_is(tmp_path):
    weights = []
    for interval in (None, 1):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        guard = SafeStep(optimizer, model, audit_interval=interval)
        guard.enabled = interval is not None
        for step in range(30):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(5, (8,)))
            loss.backward()
            if step > 20:
                scaled(model, 0.5 + step / 90)  # looked at with a second backward pass
            optimizer.step()
        weights.append(torch.cat([param.flatten() for param in model.parameters()]))

    assert torch.equal(*weights)


def test_a_penalty_that_grows_is_written_down_and_nobody_is_warned():
    """Nobody has said that the loss is one of the outputs alone."""
    told = []
    watch = GradientWatch(None, told.append, {}, None)
    feed(watch, [(1.0 + 1e-5 * (step % 3), 1.0) for step in range(20)])

    feed(watch, [(1.3, 1.1), (1.31, 1.2)], first=20)

    (event,) = told
    assert event.finding == "not audited"
    assert event.advice is None


def test_what_a_run_knows_goes_on_after_a_resume():
    told = []
    watch = GradientWatch(1, told.append, {}, None)
    feed(watch, [(1.0 + 1e-5 * (step % 3), 1.0) for step in range(20)])
    resumed = GradientWatch(1, told.append, {}, None)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))

    feed(resumed, [(1.3, 1.1), (1.31, 1.2)], first=20)

    assert [event.since for event in told] == [21]
    assert "it matched at step 19" in told[0].message


@pytest.mark.parametrize(
    ("ratios", "alarms"),
    [
        ([(1.5, 0.9)], 0),  # once may be chance
        ([(1.5, 0.9), (1.4, 0.8)], 1),
        ([(0.3, 2.0), (0.2, 2.0), (0.5, 2.0)], 0),  # clipped to one norm
        ([(0.7, 0.9), (0.6, 0.8), (0.8, 0.7)], 0),  # clipped in another way
        ([(0.5, 0.9), (0.5, 0.8)], 1),
    ],
)
def test_several_ranks_judge_by_the_ratio_alone(ratios, alarms):
    told = []
    watch = GradientWatch(1, told.append, {}, None)
    feed(watch, [(1.0 + 1e-5 * (step % 3), 1.0) for step in range(20)])

    feed(watch, ratios, first=20)

    assert sum(event.finding == "wrong" for event in told) == alarms


def feed(watch, steps, first=0):
    """Let a watch see ratios and norms of gradients."""
    update = Update([], [], [], [])
    for step, (ratio, norm) in enumerate(steps, first):
        slopes = Slopes(outputs=-1.0, gradient=-ratio, size=1.0)
        measurement = Measurement(Estimator.JVP, radius=1.0, slopes=slopes)
        watch.audited(step, measurement, update, Health(1.0, norm))
