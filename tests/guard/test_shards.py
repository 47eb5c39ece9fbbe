"""SafeStep on parameters that fully_shard distributes over the ranks of real gloo processes."""

import math

import pytest
import torch
from helpers.scripts import run_script
from torch import nn

from safestep.parallel.placements import shares
from safestep.parallel.shards import is_sharded, local

LIMIT = 1.0
JUMP, OUTLIER = 35, 50  # steps of the longer run, as in guarded_shards.py


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda ranks: f"{ranks}-ranks",
)
def ranks(request, tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("shards")
    run_script("guarded_shards.py", output, request.param)
    return [torch.load(output / f"rank{rank}.pt") for rank in range(request.param)]


def whole(state):
    block = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(0.0))
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), block, nn.Linear(7, 5, bias=False))
    model.load_state_dict(state)
    return model


def references(ranks, scenario, dense_normalized_step):
    """Yield for each step the largest r over the ranks' batches, in float64 and unsharded."""
    for step in range(5):
        before, after, _ = ranks[0][scenario]["steps"][step]
        batches = [found[scenario]["steps"][step][2] for found in ranks]
        yield dense_normalized_step(whole(before), whole(after), *batches)


@pytest.mark.parametrize(
    ("scenario", "tolerance"),
    [
        ("watched", 1e-4), ("auto", 1e-4), ("kept", 1e-4), ("replicated", 1e-4),
        ("accumulated", 1e-4), ("secant", 0.2), ("difference", 1e-3), ("bfloat16", 0.02),
        ("ahead", 1e-4), ("ahead-secant", 0.2), ("weighed", 1e-4),
    ],
)  # fmt: skip
def test_shards_are_measured_like_whole_parameters(
    ranks, scenario, tolerance, dense_normalized_step
):
    expected = list(references(ranks, scenario, dense_normalized_step))

    for found in ranks:
        measured = [report["normalized_step"] for report in found[scenario]["reports"]]
        assert measured == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("scenario", ["watched", "replicated", "accumulated", "ahead"])
def test_the_audited_gradient_of_shards_is_that_of_the_mean_loss_of_all_ranks(ranks, scenario):
    for found in ranks:
        audited = [report["gradient_ratio"] for report in found[scenario]["reports"]]
        assert audited == pytest.approx([1.0] * len(audited), rel=1e-4)


def test_ranks_predict_together_and_measure_together(ranks, dense_normalized_step):
    """A rank that ran again alone would wait for shards that no other rank gathers."""
    reports = [found["predicted"]["reports"] for found in ranks]
    steps = ranks[0]["predicted"]["steps"]

    for seen in zip(*reports, strict=True):  # one step, on every rank
        assert len({(r["estimator"], r["normalized_step"], r["step_norm"]) for r in seen}) == 1
    is_predicted = [report["estimator"] == "predicted" for report in reports[0]]
    assert 0.3 < sum(is_predicted[16:]) / len(is_predicted[16:]) < 1
    assert not any(is_predicted[:16])
    # The learning rate of all, and the loss of one.
    assert reports[0][JUMP]["status"] == "clipped"
    assert not is_predicted[JUMP]
    assert not is_predicted[OUTLIER]
    for step, report in enumerate(reports[0]):
        if step == JUMP:
            continue  # its update was scaled: what is left of it has an r of 1
        batches = [found["predicted"]["steps"][step][2] for found in ranks]
        before, after, _ = steps[step]
        exact = dense_normalized_step(whole(before), whole(after), *batches)
        if is_predicted[step]:  # from the largest of a few, over the ranks
            assert exact / 2 < report["normalized_step"] < 8 * exact
        else:  # up to the rounding of an update of 1e-4
            assert report["normalized_step"] == pytest.approx(exact, rel=1e-2)


def test_ranks_of_shards_take_secants_together(ranks, secant_normalized_step):
    """They run the model another number of times, and every run gathers."""
    reports = [found["secants"]["reports"] for found in ranks]
    steps = ranks[0]["secants"]["steps"]

    for seen in zip(*reports, strict=True):
        assert len({(r["estimator"], r["normalized_step"], r["step_norm"]) for r in seen}) == 1
    secants = [step for step, r in enumerate(reports[0]) if r["estimator"] == "secant"]
    assert len(secants) > 3
    for step in secants:
        batches = [found["secants"]["steps"][step][2] for found in ranks]
        before, after, _ = steps[step]
        expected = secant_normalized_step(whole(before), whole(after), *batches)
        assert reports[0][step]["normalized_step"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scenario", ["clipped", "replicated, clipped", "ahead-clipped"])
def test_shards_are_scaled_to_the_limit(ranks, scenario, dense_normalized_step):
    for applied in references(ranks, scenario, dense_normalized_step):
        assert applied == pytest.approx(LIMIT, rel=1e-4)  # float32
    for found in ranks:
        assert {report["status"] for report in found[scenario]["reports"]} == {"clipped"}
        for seen, first in zip(found[scenario]["steps"], ranks[0][scenario]["steps"], strict=True):
            assert all(map(torch.equal, seen[1].values(), first[1].values()))


@pytest.mark.parametrize("scenario", ["watched", "replicated"])
def test_shards_have_the_step_norm_of_the_whole_update(ranks, scenario):
    for step in range(5):
        before, after, _ = ranks[0][scenario]["steps"][step]
        squares = [float((after[name] - before[name]).double().square().sum()) for name in before]
        for found in ranks:
            report = found[scenario]["reports"][step]
            assert report["step_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


@pytest.mark.parametrize("scenario", ["watched", "ahead"])
def test_shards_train_bitwise_as_without_a_guard_that_only_watches(ranks, scenario):
    for found in ranks:
        for guarded, plain in zip(
            found[scenario]["steps"], found["unguarded"]["steps"], strict=True
        ):
            assert all(map(torch.equal, guarded[1].values(), plain[1].values()))
        assert all(map(torch.equal, found[scenario]["moments"], found["unguarded"]["moments"]))


@pytest.mark.parametrize("scenario", ["skipped", "ahead-skipped"])
def test_shards_are_put_back_after_a_gradient_that_is_not_finite(ranks, scenario):
    for found in ranks:
        before, after, _ = found[scenario]["steps"][1]
        report = found[scenario]["reports"][1]
        assert (report["status"], report["scale"]) == ("skipped", 0.0)
        assert all(map(torch.equal, before.values(), after.values()))
        assert all(moment.isfinite().all() for moment in found[scenario]["moments"])


def test_flattened_parameters_are_measured_scaled_and_undone_like_whole_ones(ranks):
    for found in ranks:
        whole, flat = found["flattened"]["whole"], found["flattened"]["all"]
        for one, other in zip(whole["reports"], flat["reports"], strict=True):
            assert other["status"] == one["status"]
            # By a difference: off by 1e-3 at most, which clipping carries on.
            for field in ("normalized_step", "step_norm"):
                assert other[field] == pytest.approx(one[field], rel=5e-3, nan_ok=True)
        statuses = [report["status"] for report in flat["reports"]]
        assert statuses == ["ok", "skipped", "clipped", "ok"]
        torch.testing.assert_close(flat["logits"], whole["logits"], rtol=1e-2, atol=1e-2)


def test_flattened_parameters_of_which_ranks_hold_copies_are_unmeasured_and_say_so(ranks):
    report = ranks[0]["flattened"]["hybrid"]["reports"][0]

    assert report["status"] == "unmeasured"
    assert "FullyShardedDataParallel with NO_SHARD is not measured" in report["reason"]


def test_whole_parameters_are_their_own_shard():
    param = nn.Parameter(torch.ones(3))

    assert not is_sharded(param)
    assert local(param) is param
    assert shares([param, param]) == [1.0, 1.0]
