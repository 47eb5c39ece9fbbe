"""Which steps over the limit are shortened, by the loss that linearised logits predict."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.guard.controller import StepController
from safestep.guard.decrease import FLOOR, MEMORY
from safestep.measure.update import Estimator, Measurement
from safestep.radius.loss_change import LossChange
from safestep.runlog.reader import read_run


def measured(slope, divergence, r=4.0, reason=None):
    change = LossChange(divergence, slope, 1.0, reason)
    return Measurement(Estimator.JVP, radius=1 / r, spread=r * math.pi, step_norm=1.0, loss=change)


def statuses(controller, *measurements):
    return [controller.decide(each, 0.1).status for each in measurements]


FALLS = measured(-1.0, 0.3)
RISES = measured(-1.0, 1.5)
FALLS_LITTLE = measured(-1.0, 0.8)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(None, ["clipped"] * 3), (0.0, ["ok", "ok", "clipped"]), (0.5, ["ok", "clipped", "clipped"])],
    ids=str,
)
def test_a_step_over_the_limit_is_left_alone_if_its_loss_falls_enough(share, expected):
    seen = [
        StepController(sufficient_decrease=share).decide(each, 0.1).status
        for each in (FALLS, FALLS_LITTLE, RISES)
    ]

    assert seen == expected


def test_a_step_within_the_limit_is_left_alone_whatever_its_loss():
    controller = StepController(sufficient_decrease=0.5)

    assert statuses(controller, measured(-1.0, 5.0, r=0.9), FALLS) == ["ok", "ok"]


def test_what_is_shortened_is_shortened_to_the_limit():
    report = StepController(max_normalized_step=2.0, sufficient_decrease=0).decide(RISES, 0.1)

    assert report.scale == pytest.approx(0.5)
    assert report.reason == (
        "the linearised loss would change by 0.5 nats where its slope promises -1"
    )


def test_the_next_steps_are_held_within_the_limit_and_say_so():
    controller = StepController(sufficient_decrease=0)
    controller.step = 413
    controller.decide(RISES, 0.1)

    held = [controller.decide(FALLS, 0.1) for _ in range(MEMORY)]
    after = controller.decide(FALLS, 0.1)

    assert {report.status for report in held} == {"clipped"}
    assert {report.reason for report in held} == {
        "held within the limit for 16 steps after step 413"
    }
    assert after.status == "ok"
    assert after.reason == "over the limit and left alone: the linearised loss falls enough"


def test_another_rise_begins_the_memory_anew():
    controller = StepController(sufficient_decrease=0)
    seen = statuses(controller, RISES, *[FALLS] * 10, RISES, *[FALLS] * 17)

    assert seen == ["clipped"] * 28 + ["ok"]


def test_the_memory_is_in_the_state():
    controller, resumed = (StepController(sufficient_decrease=0) for _ in range(2))
    statuses(controller, RISES, FALLS)
    resumed.load_state_dict(controller.state_dict())

    assert statuses(resumed, FALLS) == ["clipped"]
    assert statuses(StepController(sufficient_decrease=0), FALLS) == ["ok"]


def test_a_divergence_too_small_to_matter_is_let_through_uphill():
    controller = StepController(sufficient_decrease=0.5)

    assert statuses(controller, measured(+0.1, FLOOR / 2)) == ["ok"]
    assert statuses(controller, measured(+0.1, 2 * FLOOR)) == ["clipped"]


@pytest.mark.parametrize("slope", [math.nan, -1.0])
def test_a_decrease_that_is_not_known_is_not_assumed(slope):
    controller = StepController(sufficient_decrease=0)
    divergence = 0.1 if math.isnan(slope) else math.nan

    report = controller.decide(measured(slope, divergence, reason="no labels"), 0.1)

    assert report.status == "clipped"
    assert report.reason == "it is not known whether the loss would fall: no labels"


def test_monitor_changes_nothing():
    controller = StepController(action="monitor", sufficient_decrease=0)

    assert statuses(controller, RISES, FALLS) == ["ok", "ok"]


def test_a_long_step_downhill_passes_and_a_spike_is_shortened_and_held(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))
    inputs = torch.randn(64, 6)
    labels = inputs[:, :4].argmax(-1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    with SafeStep(optimizer, model, sufficient_decrease=0, run_dir=tmp_path) as guard:
        reports = []
        for step in range(40):
            optimizer.param_groups[0]["lr"] = 5.0 if 20 <= step < 25 else 0.05
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            reports.append(guard.last)
        held_since = guard.state_dict()["held_since"]

    assert {report.status for report in reports[:20]} == {"ok"}
    assert {report.status for report in reports[20:25]} == {"clipped"}
    assert reports[20].predicted_change > 0
    assert 20 <= held_since < 25
    run = read_run(tmp_path)
    assert run.settings["sufficient_decrease"] == 0
    assert "slope promises" in run.steps["reason"][20]


def reports_of_adadelta(estimator):
    """Return the reports of 60 steps, most of which are over the limit and bring the loss down."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = (nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 4))
    model = nn.Sequential(nn.Linear(20, 20), nn.LayerNorm(20), nn.ReLU(), *layers)
    inputs = torch.randn(256, 20, generator=generator)
    labels = torch.randint(4, (256,), generator=generator)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=4.0)
    with SafeStep(optimizer, model, sufficient_decrease=0, estimator=estimator) as guard:
        reports = []
        for _ in range(60):
            rows = torch.randint(256, (32,), generator=generator)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            reports.append(guard.last)
    return reports


def test_auto_spares_long_steps_that_pass_and_shortens_those_that_jvp_shortens():
    auto, exact = map(reports_of_adadelta, ("auto", "jvp"))

    long = [report for report in exact[16:] if report.normalized_step > 1]
    spared = [one for one, two in zip(auto, exact, strict=True) if two in long and one.bottleneck]
    assert len(long) > 20
    assert len(spared) < 0.5 * len(long)
    assert [report.status for report in auto] == [report.status for report in exact]
