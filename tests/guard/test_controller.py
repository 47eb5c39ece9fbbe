"""From measured rows to a decision: hand-made rows and measurements, values by hand."""

import dataclasses
import math

import pytest
import torch

from safestep.guard.controller import StepController
from safestep.guard.rank_messages import worst_of
from safestep.guard.step_report import StepReport
from safestep.measure.update import Estimator, Finding, Measurement
from safestep.radius.batch import LogitTangent, smallest_row


def rows_of(*spreads, mask=None):
    """Return one set of two-class rows with equal logits and these spreads."""
    tangent = torch.tensor([[0.0, spread] for spread in spreads])
    return LogitTangent("logits", torch.zeros_like(tangent), tangent, mask)


def measured(radius, **changes):
    measurement = Measurement(
        Estimator.JVP, radius=radius, spread=math.pi / radius, bottleneck=0, step_norm=2.0
    )
    return dataclasses.replace(measurement, **changes)


def decide(measurement, **options) -> StepReport:
    return StepController(**options).decide(measurement, learning_rate=0.1)


def test_the_row_with_the_largest_spread_sets_the_radius_over_all_sets_of_rows():
    radius, spread, index = smallest_row([rows_of(1, 2), rows_of(3, 8, 4)], rung="bound").tolist()

    assert radius == pytest.approx(math.pi / 8, rel=1e-6)
    assert (spread, index) == (8.0, 3)


def test_a_masked_row_sets_nothing():
    rows = rows_of(1, 9, 2, mask=torch.tensor([True, False, True]))

    radius, spread, index = smallest_row([rows], rung="bound").tolist()

    assert radius == pytest.approx(math.pi / 2, rel=1e-6)
    assert (spread, index) == (2.0, 2)


def test_rows_of_every_leading_shape_are_counted_in_order():
    tangent = torch.zeros(2, 3, 4)
    tangent[1, 2, 3] = 5.0

    _, spread, index = smallest_row(
        [LogitTangent("logits", torch.zeros(2, 3, 4), tangent)], rung="bound"
    ).tolist()

    assert (spread, index) == (5.0, 5)


def test_a_batch_of_masked_rows_has_an_infinite_radius():
    rows = rows_of(3, 4, mask=torch.zeros(2, dtype=torch.bool))

    radius, spread, _ = smallest_row([rows], rung="bound").tolist()

    assert (radius, spread) == (math.inf, 0.0)


def test_a_row_that_is_nan_makes_the_radius_nan():
    assert smallest_row([rows_of(1, math.nan)], rung="bound")[0].isnan()
    assert smallest_row([rows_of(1, math.nan, 2)], rung="bound", quantile=0.5)[0].isnan()


@pytest.mark.parametrize(("quantile", "spread"), [(1.0, 10), (0.9, 10), (0.8, 9), (0.5, 6)])
def test_a_quantile_is_the_r_that_at_least_this_share_of_the_rows_stays_under(quantile, spread):
    rows = rows_of(*range(1, 11), mask=None)

    radius = smallest_row([rows], rung="bound", quantile=quantile)[0].item()

    assert radius == pytest.approx(math.pi / spread, rel=1e-6)
    share = sum(s <= spread for s in range(1, 11)) / 10
    assert share >= quantile


def test_masked_rows_have_no_share_in_a_quantile():
    mask = torch.tensor([True] * 3 + [False] * 97)
    rows = rows_of(1, 2, 3, *[50] * 97, mask=mask)

    radius = smallest_row([rows], rung="bound", quantile=0.5)[0].item()

    assert radius == pytest.approx(math.pi / 2, rel=1e-6)


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="expected at least one set of rows, got none"):
        smallest_row([], rung="bound")


def test_the_certified_radius_of_two_classes_is_the_exact_one():
    logits, tangent = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 6.0]])

    radius = smallest_row([LogitTangent("logits", logits, tangent)], rung="certified")[0].item()

    assert radius == pytest.approx(math.hypot(4.0, math.pi) / 6.0, rel=1e-6)


@pytest.mark.parametrize(
    ("action", "radius", "scale", "status"),
    [
        ("clip", 0.25, 0.125, "clipped"),
        ("clip", 4.0, 1.0, "ok"),
        ("clip", 2.0, 1.0, "ok"),
        ("clip", math.inf, 1.0, "ok"),
        ("set", 0.25, 0.125, "clipped"),
        ("set", 8.0, 4.0, "ok"),
        ("set", math.inf, 1.0, "ok"),
        ("monitor", 0.25, 1.0, "ok"),
        ("monitor", 8.0, 1.0, "ok"),
    ],
)
def test_the_scale_brings_r_to_the_limit_as_the_action_says(action, radius, scale, status):
    report = decide(measured(radius), action=action, max_normalized_step=0.5)

    assert (report.scale, report.status) == (scale, status)
    assert report.normalized_step == 1 / radius


def test_the_report_holds_parameter_distances_and_the_effective_learning_rate():
    report = decide(measured(0.25, bottleneck=7))

    assert report.step_norm == 2.0
    assert report.radius == report.step_norm / report.normalized_step == 0.5
    assert report.spread == pytest.approx(math.pi / report.radius)
    assert report.effective_learning_rate == 0.25 * report.learning_rate
    assert (report.bottleneck, report.estimator, report.reason) == (7, "jvp", None)
    with pytest.raises(dataclasses.FrozenInstanceError, match="scale"):
        report.scale = 1.0


def test_a_radius_of_zero_stops_the_step_without_a_division():
    report = decide(dataclasses.replace(measured(1.0), radius=0.0, spread=math.inf))

    assert (report.normalized_step, report.scale, report.status) == (math.inf, 0.0, "clipped")


def test_a_quantile_is_reported_as_uncertified():
    assert decide(measured(1.0), quantile=0.99).estimator == "jvp (0.99 quantile, uncertified)"


@pytest.mark.parametrize("action", ["clip", "set", "monitor"])
@pytest.mark.parametrize("finding", list(Finding), ids=lambda finding: finding.name.lower())
def test_only_a_finding_that_is_not_finite_forbids_the_step(finding, action):
    radius = 2.0 if finding is Finding.MEASURED else math.nan
    row = 0 if finding is Finding.MEASURED else -1
    report = decide(measured(radius, finding=finding, bottleneck=row, reason="why"), action=action)

    is_forbidden = finding >= Finding.MEASUREMENT_NOT_FINITE and action != "monitor"
    assert (report.status == "skipped") == is_forbidden
    if is_forbidden:
        assert report.scale == report.effective_learning_rate == 0.0
    elif finding is not Finding.MEASURED:
        assert (report.status, report.scale) == ("unmeasured", 1.0)
        assert math.isnan(report.normalized_step)
        assert report.bottleneck is None


def test_what_other_workers_measured_shrinks_a_step_but_does_not_lengthen_it():
    short = measured(0.25, finding=Finding.UNMEASURED)
    long = measured(8.0, finding=Finding.UNMEASURED)

    assert decide(short, action="set").scale == 0.25
    assert decide(long, action="set").scale == 1.0
    assert decide(long, action="set").status == "unmeasured"


def test_workers_act_on_the_smallest_radius_of_any():
    assert worst_of([measured(2.0), measured(0.5), measured(1.0)]).radius == 0.5


def test_workers_act_on_the_gravest_finding_and_name_its_rank():
    reason = "the gradient is not finite: weight"
    broken = measured(math.nan, finding=Finding.GRADIENT_NOT_FINITE, reason=reason)
    unknown = measured(math.nan, finding=Finding.UNMEASURED)

    worst = worst_of([measured(2.0), unknown, broken])

    assert worst.finding is Finding.GRADIENT_NOT_FINITE
    assert worst.reason == "rank 2: the gradient is not finite: weight"
    assert worst.radius == 2.0


def test_workers_are_told_every_reason_once():
    reasons = ["timed out", "labels are gone", "timed out"]
    worst = worst_of([measured(2.0, finding=Finding.UNMEASURED, reason=r) for r in reasons])

    assert worst.reason == "rank 0: timed out; rank 1: labels are gone"


def test_skips_are_counted_in_a_row():
    controller = StepController()
    broken = measured(math.nan, finding=Finding.UPDATE_NOT_FINITE)
    counts = []

    for measurement in (broken, broken, measured(1.0), broken):
        controller.decide(measurement, 0.1)
        counts.append(controller.skips_in_a_row)

    assert counts == [1, 2, 0, 1]


def test_state_makes_a_round_trip_and_is_not_changed():
    controller, resumed = StepController(), StepController()
    controller.decide(measured(1.0), 0.1)
    controller.decide(measured(math.nan, finding=Finding.UPDATE_NOT_FINITE), 0.1)
    state = controller.state_dict()
    before = dict(state)

    resumed.load_state_dict(state)
    report = resumed.decide(measured(1.0), 0.1)

    assert before == state == {"step": 2, "skips_in_a_row": 1}
    assert report.step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_normalized_step": 0}, "`max_normalized_step` to be a positive number, got 0"),
        ({"max_normalized_step": math.nan}, "`max_normalized_step` to be a positive.*got nan"),
        ({"max_normalized_step": "1"}, "`max_normalized_step` to be a positive.*got '1'"),
        ({"radius": "exact"}, "`radius` to be one of 'bound', 'certified', got 'exact'"),
        ({"action": "stop"}, "`action` to be one of 'clip', 'set', 'monitor', got 'stop'"),
        ({"quantile": 0.0}, r"`quantile` to be None or a float in \(0, 1\], got 0.0"),
        ({"quantile": 99}, r"`quantile` to be None or a float in \(0, 1\], got 99"),
        ({"sufficient_decrease": 1.0}, r"`sufficient_decrease` to be None or a .* \[0, 1\), got 1"),
        ({"sufficient_decrease": -0.1}, "`sufficient_decrease` to be None or a number.*got -0.1"),
        ({"sufficient_decrease": True}, "`sufficient_decrease` to be None or a number.*got True"),
        ({"sufficient_decrease": "0"}, "`sufficient_decrease` to be None or a number.*got '0'"),
        (
            {"sufficient_decrease": 0.5, "action": "set"},
            "`sufficient_decrease` to be None with action 'set', got 0.5",
        ),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_an_error_that_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        StepController(**options)


@pytest.mark.parametrize("rung", ["bound", "certified"])
def test_a_single_row_without_an_axis_for_rows_is_measured(rung):
    logits, tangent = torch.tensor([4.0, 0.0, 0.0]), torch.tensor([5.0, -1.5, 0.0])
    row = LogitTangent("logits", logits, tangent)
    batch = LogitTangent("logits", logits[None], tangent[None])

    found = smallest_row([row], rung=rung, limit=1.0)

    torch.testing.assert_close(found, smallest_row([batch], rung=rung, limit=1.0))
