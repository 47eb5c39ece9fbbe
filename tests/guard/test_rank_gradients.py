"""The rank whose own gradient is off is named, on real gloo processes and from numbers."""

import json

import pytest
from helpers.scripts import run_script

from safestep.guard.rank_gradients import RankGradients
from safestep.measure.slopes import Slopes
from safestep.report.verdict import write_verdict
from safestep.runlog.reader import read_run

FAULTY_FROM = 9  # as in the script


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda ranks: f"{ranks}-ranks",
)
def found(request, tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("gradients")
    run_script("gradient_ranks.py", output, request.param)
    ranks = [json.loads((output / f"rank{r}.json").read_text()) for r in range(request.param)]
    return output, ranks


def events(found, name):
    run = read_run(found[0] / name.replace(" ", "_"))
    return [event for event in run.events if event["name"] == "gradient"]


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("scaled", "1.05"), ("stale", ""), ("sign", "-1"), ("accumulated", "1.05"), ("half", "-")],
)
def test_the_rank_with_a_fault_is_named_in_log_warning_and_report(found, name, ratio):
    output, ranks = found
    last = len(ranks) - 1

    event = events(found, name)[0]

    assert (event["finding"], event["ranks"]) == ("wrong", [last])
    assert event["step"] == event["since"] == FAULTY_FROM
    assert f"rank {last}: ratio {ratio}" in event["message"]
    (warned,) = ranks[0][name]["warned"]
    assert f"rank {last}: ratio {ratio}" in warned
    assert "Look on that rank for" in warned
    assert not any(each[name]["warned"] for each in ranks[1:])
    assert f"rank {last}: ratio" in write_verdict(read_run(output / name)).headline


def test_the_end_of_a_fault_is_told_with_its_rank(found):
    *_, end = events(found, "scaled")

    assert (end["finding"], end["ranks"]) == ("right", [len(found[1]) - 1])
    assert end["step"] == FAULTY_FROM + 3


@pytest.mark.parametrize("name", ["clean", "clean without", "clean half", "clipped"])
def test_clean_and_clipped_training_names_nobody(found, name):
    assert not events(found, name)
    assert not found[1][0][name]["warned"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("all", "the own gradients of most ranks were off"),
        ("after scaled", "before the all-reduce each rank's own gradient matched its loss"),
        ("seldom", "WorkerMetrics did not record the backward pass of this step"),
        ("after layer", "no WorkerMetrics keeps what the gradients were before the all-reduce"),
    ],
)
def test_a_wrong_mean_says_why_it_names_no_rank(found, name, why):
    (event,) = events(found, name)

    assert (event["finding"], event["ranks"]) == ("wrong", [])
    assert why in event["message"]


def test_without_an_interval_a_named_rank_is_only_written_down(found):
    (event,) = events(found, "not asked")

    assert (event["finding"], event["ranks"]) == ("not audited", [len(found[1]) - 1])
    assert not found[1][0]["not asked"]["warned"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("after scaled", "the whole gradient is 1.05 times that of a second backward pass"),
        ("after layer", "0.weight differs most from a second backward pass"),
        ("penalty", "differs most from a second backward pass"),
    ],
)
def test_ranks_average_a_second_gradient_that_tells_the_cause(found, name, cause):
    (event,) = events(found, name)

    assert cause in event["message"]


def test_a_rank_that_cannot_repeat_its_backward_pass_leaves_nobody_waiting(found):
    (event,) = events(found, "unrepeatable")

    assert event["step"] == FAULTY_FROM + 1  # the second mismatch, judged by the ratio alone
    assert "a second gradient was not computed" in event["message"]


def test_audits_on_ranks_leave_training_bitwise_as_it_is(found):
    for rank in found[1]:
        assert rank["after layer"]["weights"] == rank["plain"]["weights"]


def judged(steps):
    """Return which ranks are named after each step of ratios."""
    watch, named = RankGradients(), []
    for step, ratios in enumerate(steps):
        watch.judge(step, [Slopes(-1.0, -ratio, 1.0) for ratio in ratios])
        named.append(dict(watch.named))
    return named


USUAL = [(1 + 1e-7 * (step % 3), 1 - 1e-7, 1.0) for step in range(10)]


def test_a_gross_fault_is_named_at_once_and_a_small_one_at_the_second_audit():
    assert judged([*USUAL, (1.0, 1.05, 1.0)])[-1] == {1: 10}
    assert judged([*USUAL, (1.0, 1.001, 1.0)])[-1] == {}
    assert judged([*USUAL, (1.0, 1.001, 1.0), (1.0, 1.002, 1.0)])[-1] == {1: 10}
    assert judged([*USUAL, (1.0, 1.001, 1.0), (1.0, 1.0, 1.002)])[-1] == {}


def test_a_small_fault_stays_named_until_an_audit_clears_it():
    faulty = [*USUAL, (1.05, 1.0, 1.0), (1.001, 1.0, 1.0)]

    assert judged(faulty)[-1] == {0: 10}
    assert judged([*faulty, (float("nan"), 1.0, 1.0)])[-1] == {0: 10}  # tells nothing of it
    assert judged([*faulty, (1.0, 1.0, 1.0)])[-1] == {}


def test_ranks_that_are_off_together_are_not_named():
    assert judged([*USUAL, (1.05, 1.1, 1.0)])[-1] == {}
    assert judged([*USUAL, (1.0, float("nan"), 1.05)])[-1] == {2: 10}


@pytest.mark.parametrize(
    ("ratios", "why"),
    [
        ((1.0, 1.001, 1.0), "only rank 1 may be off, which the next audit tells"),
        ((1.3, 1.2, 1.0), "the own gradients of most ranks were off"),
        ((1.0, 1.0, 1.0), "each rank's own gradient matched"),
        ((1.0, 1.0, float("nan")), "because the own gradient of rank 2 is not known"),
    ],
)
def test_it_says_why_a_wrong_mean_names_no_rank(ratios, why):
    watch = RankGradients()
    ranks = tuple(Slopes(-1.0, -ratio, 1.0) for ratio in ratios)
    watch.judge(0, ranks)

    told = watch.why_unnamed(Slopes(-1.0, -1.1, 1.0, own=ranks[0], ranks=ranks))

    assert told is not None
    assert why in told


def test_what_is_known_of_ranks_goes_on_after_a_resume():
    watch, resumed = RankGradients(), RankGradients()
    for step, ratios in enumerate([*USUAL, (1.0, 1.0, 0.9)]):
        watch.judge(step, [Slopes(-1.0, -ratio, 1.0) for ratio in ratios])

    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))

    assert resumed.named == watch.named == {2: 10}
    assert resumed.state_dict() == watch.state_dict()
