"""SafeStep over the ranks of real gloo processes: one decision, the same bits everywhere."""

import json
import math

import pytest
import torch
from helpers.scripts import run_script
from torch import nn

from safestep.guard.agreement import Agreement
from safestep.guard.predictor import NEAR
from safestep.measure.update import Estimator, Finding, Measurement
from safestep.parallel.collectives import rank, world_size
from safestep.parallel.ranks import Ranks

LIMIT = 1.0


def load_ranks(output, num_ranks):
    return [torch.load(output / f"rank{r}.pt", weights_only=False) for r in range(num_ranks)]


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda ranks: f"{ranks}-ranks",
)
def ranks(request, tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("ranks")
    run_script("guarded_ranks.py", output, request.param)
    return load_ranks(output, request.param)


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


def parameters(state):
    """Return the state without BatchNorm's running statistics, which each rank has its own of."""
    return {name: value for name, value in state.items() if "body.1.running" not in name}


def network(state):
    """Return the network of the scripts, without its branching, at a state that a rank saw."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh())
            self.branch, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, inputs):
            hidden = self.body(inputs)
            return self.head(hidden + self.branch(hidden))

    model = Net()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    "scenario", ["clipped", "held", "raises while clipped", "skipped", "subgroup"]
)
def test_ranks_stay_bitwise_equal_after_an_intervention(ranks, scenario):
    for other in ranks[1:]:
        assert_same_bits(
            parameters(ranks[0][scenario]["after"]), parameters(other[scenario]["after"])
        )


@pytest.mark.parametrize("scenario", ["clipped", "subgroup"])
def test_ranks_clip_to_the_limit_of_the_tightest_rank(ranks, scenario, dense_normalized_step):
    for step in range(3):
        applied = []
        for found in ranks:
            before, after, inputs = found[scenario]["steps"][step]
            applied.append(dense_normalized_step(network(before), network(after), inputs))
            assert found[scenario]["reports"][step].status == "clipped"
        assert max(applied) == pytest.approx(LIMIT, rel=1e-4)  # float32


@pytest.mark.parametrize(
    "scenario",
    ["clipped", "held", "skipped", "raises", "raises while clipped", "not finite", "blind"],
)
def test_ranks_report_the_same(ranks, scenario):
    fields = ("status", "scale", "normalized_step", "radius", "step_norm", "reason")
    for step in range(3):
        reports = [found[scenario]["reports"][step] for found in ranks]
        seen = {repr([getattr(report, field) for field in fields]) for report in reports}
        assert len(seen) == 1


def test_ranks_predict_from_the_same_numbers_and_measure_in_the_same_steps(ranks):
    """What looks unusual in one's own data need not be so in the batch of all."""
    steps = zip(*(found["predicted"]["reports"] for found in ranks), strict=True)
    seen = [{(r.estimator, r.normalized_step, r.scale) for r in reports} for reports in steps]

    assert all(len(found) == 1 for found in seen)
    is_predicted = [estimator == "predicted" for ((estimator, _, _),) in seen]
    assert not any(is_predicted[:16])
    assert is_predicted[30]  # where the gradient of one rank, far below the others', jumps
    assert sum(is_predicted[16:]) > 0.5 * len(is_predicted[16:])


def test_ranks_take_secants_together_and_measure_together_where_one_is_near_the_limit(
    ranks, secant_normalized_step
):
    reports = [found["secants"]["reports"] for found in ranks]
    secants = 0

    for step, seen in enumerate(zip(*reports, strict=True)):
        assert len({(r.estimator, r.normalized_step, r.scale) for r in seen}) == 1
        if seen[0].estimator != "secant":
            continue
        secants += 1
        expected = max(
            secant_normalized_step(network(before), network(after), inputs)
            for before, after, inputs in (found["secants"]["steps"][step] for found in ranks)
        )
        assert seen[0].normalized_step == pytest.approx(expected, rel=1e-3)
        assert seen[0].normalized_step <= NEAR

    assert secants > 3


def test_ranks_measure_exactly_together_where_the_secant_of_one_raises(ranks):
    reports = [found["secant raises"]["reports"] for found in ranks]

    for seen in zip(*reports, strict=True):
        assert len({(r.estimator, r.normalized_step, r.scale) for r in seen}) == 1
        assert seen[0].estimator in ("jvp", "predicted")
        assert seen[0].status in ("ok", "clipped")


@pytest.mark.slow
def test_many_ranks_do_not_measure_more_often_than_one(tmp_path):
    """Each for itself would: some data look unusual on one of them in every eighth step."""
    shares = []
    for num_ranks in (1, 8):
        run_script("measured_share.py", tmp_path, num_ranks)
        paths = [tmp_path / f"rank{rank}.json" for rank in range(num_ranks)]
        ranks = [json.loads(path.read_text())[20:] for path in paths]
        measured = [set(estimators) != {"predicted"} for estimators in zip(*ranks, strict=True)]
        shares.append(sum(measured) / len(measured))

    assert shares[0] < 0.03
    assert shares[1] < 0.03


def test_a_rank_that_raises_is_named_and_holds_nobody_up(ranks):
    reports = ranks[0]["raises"]["reports"]

    assert [report.status for report in reports] == ["unmeasured"] * 3
    assert {report.reason for report in reports} == {"rank 1: KeyError: 'labels are gone'"}
    # The others measured, and their r is what is known.
    assert all(0 < report.normalized_step < LIMIT for report in reports)


def test_a_rank_that_raises_does_not_keep_the_others_from_clipping(ranks):
    for report in ranks[0]["raises while clipped"]["reports"]:
        assert report.status == "clipped"
        assert report.reason.startswith("rank 1: KeyError")


def test_a_rank_whose_measurement_is_not_finite_is_named_and_nobody_steps(ranks):
    reports = ranks[0]["not finite"]["reports"]

    assert [report.status for report in reports] == ["skipped"] * 3
    reason = "rank 1: the logits or their tangent are not finite"
    assert all(report.reason.startswith(reason) for report in reports)


def test_ranks_undo_a_step_after_a_nan_in_one_batch_together(ranks):
    for found in ranks:
        statuses = [report.status for report in found["skipped"]["reports"]]
        assert statuses == ["ok", "skipped", "ok"]
        weights = [v for k, v in found["skipped"]["after"].items() if "running" not in k]
        assert all(value.isfinite().all() for value in weights)


def test_ranks_that_are_all_blind_step_as_without_a_guard(ranks):
    assert {report.status for report in ranks[0]["blind"]["reports"]} == {"unmeasured"}


@pytest.mark.parametrize("scenario", ["plain", "find_unused_parameters", "static_graph"])
def test_the_audited_gradient_is_that_of_the_mean_loss_of_all_ranks(ranks, scenario):
    for found in ranks:
        audited = [report.gradient_ratio for report in found[scenario]["reports"]]
        assert audited == pytest.approx([1.0] * len(audited), rel=1e-4)


def loss_change(before, after, inputs):
    """Return slope and divergence of one rank's loss along the update, in float64."""
    model = network(before).double()
    start = {name: p.detach() for name, p in model.named_parameters()}

    def logits(share):
        params = {n: p + share * (after[n].double() - p) for n, p in start.items()}
        return torch.func.functional_call(model, params, (inputs.double(),)).detach()

    def loss(z):
        return nn.functional.cross_entropy(z, torch.arange(8) % 4)

    z, a = logits(0.0), (logits(1e-5) - logits(-1e-5)) / 2e-5
    slope = (loss(z + 1e-5 * a) - loss(z - 1e-5 * a)) / 2e-5
    return torch.stack((slope, loss(z + a) - loss(z) - slope))


def test_the_predicted_change_is_that_of_the_mean_loss_of_all_ranks(ranks):
    for step in range(16):
        seen = [found["secants"]["reports"][step] for found in ranks]
        if seen[0].estimator != "jvp" or seen[0].scale != 1:
            continue
        each = [loss_change(*found["secants"]["steps"][step]) for found in ranks]
        slope, divergence = torch.stack(each).mean(0).tolist()

        for report in seen:
            assert report.loss_slope == pytest.approx(slope, rel=1e-3)
            assert report.divergence == pytest.approx(divergence, rel=1e-3)


def test_ranks_remember_together_that_a_step_was_shortened(ranks):
    for found in ranks:
        reports = found["held"]["reports"]
        assert {report.status for report in reports} == {"clipped"}
        rising = [report for report in reports if report.predicted_change > 0]
        assert rising
        for report in rising:
            assert "slope promises" in report.reason


def test_a_rank_that_does_not_measure_leaves_the_change_of_the_loss_unknown(ranks):
    for found in ranks:
        for report in found["raises"]["reports"]:
            assert math.isnan(report.loss_slope)
            assert report.loss_reason is not None


@pytest.mark.parametrize(
    "scenario", ["plain", "find_unused_parameters", "static_graph", "bucket views", "accumulated"]
)
def test_ranks_train_bitwise_as_without_a_guard_that_only_watches(ranks, scenario):
    for found in ranks:
        assert {report.status for report in found[scenario]["reports"]} == {"ok"}
        assert_same_bits(found[scenario]["after"], found[scenario]["unguarded"])


@pytest.mark.slow
def test_a_rank_that_dies_leaves_the_other_no_longer_than_the_group_timeout(tmp_path):
    run_script("dying_rank.py", tmp_path, "guard")

    assert float((tmp_path / "raised").read_text()) < 5 + 2


def test_a_lone_rank_agrees_with_itself():
    measurement = Measurement(Estimator.JVP, Finding.UNMEASURED, float("nan"), 1.0, -1, 2.0, "why")

    param = nn.Parameter(torch.zeros(2))
    agreement = Agreement(torch.optim.SGD([param]), Ranks([param], None), tell=print)

    assert agreement.measurement(measurement) is measurement
    assert (rank(), world_size()) == (0, 1)


@pytest.fixture(scope="module")
def fabric(tmp_path_factory):
    """What Fabric's ranks saw, and a single process under bfloat16 autocast."""
    output = tmp_path_factory.mktemp("fabric")
    run_script("guarded_fabric.py", output)
    return {name: torch.load(output / f"{name}.pt") for name in ("rank0", "rank1", "alone")}


@pytest.mark.slow
@pytest.mark.parametrize("process", ["rank0", "rank1", "alone"])
def test_fabric_trains_bitwise_as_without_a_guard_that_only_watches(fabric, process):
    found = fabric[process]["watched"]

    assert {(report["status"], report["estimator"]) for report in found["reports"]} == {
        ("ok", "jvp")
    }
    assert_same_bits(found["after"], fabric[process]["unguarded"]["after"])


@pytest.mark.slow
def test_fabric_ranks_clip_to_the_limit_of_the_tightest(fabric, dense_normalized_step):
    for step in range(4):
        applied = []
        for process in ("rank0", "rank1"):
            before, after, inputs = fabric[process]["clipped"]["steps"][step]
            model, moved = (
                nn.Sequential(
                    nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0), nn.Linear(12, 4)
                )
                for _ in range(2)
            )
            model.load_state_dict(before)
            moved.load_state_dict(after)
            applied.append(dense_normalized_step(model, moved, inputs))
        assert max(applied) == pytest.approx(LIMIT, rel=1e-4)  # float32
