"""Worker metrics: real gloo processes beside by-hand gradients, micro-batches, and the run log."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers.scripts import run_script
from torch import nn

from safestep.workers.metrics import WorkerMetrics


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every scenario found, per rank; one start of four processes for all of them."""
    output = tmp_path_factory.mktemp("scenarios")
    run_script("ddp_scenarios.py", output)
    return [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(4)]


def cosine(left, right):
    return left @ right / (np.linalg.norm(left) * np.linalg.norm(right))


def assert_by_hand(scenario, rtol=1e-6):
    """Compare a report with numpy on the gradients that a plain copy of the model had."""
    losses, gradients, mean = (scenario[name].numpy() for name in ("losses", "gradients", "mean"))
    norms = np.linalg.norm(gradients, axis=1)
    expected = {
        "loss": losses,
        "grad_norm": norms,
        "cosine_to_mean": [cosine(gradient, mean) for gradient in gradients],
        "loss_std": losses.std(),
        "loss_range": np.ptp(losses),
        "grad_norm_std": norms.std(),
        "pairwise_cosine": np.mean([cosine(*p) for p in itertools.combinations(gradients, 2)]),
    }
    for name, value in expected.items():
        # Differences of nearly equal numbers have the absolute error of those numbers.
        atol = rtol * np.abs(norms if name.startswith("grad") else losses).max()
        np.testing.assert_allclose(
            scenario["report"][name], value, rtol=rtol, atol=max(atol, rtol), err_msg=name
        )


@pytest.mark.parametrize(
    "name",
    [
        "two ranks",
        "three ranks",
        "four ranks",
        "bucket views",
        "static graph",
        "unused parameters",
        "unused, bucket views",
        "no_sync",
        "no_sync, bucket views",
        "no_sync, recorded outside",
        "no_sync, unused last",
        "float64",
        "sparse",
        "fp16 hook",
        "fp16 hook, registered later",
        "powerSGD hook",
        "powerSGD hook, several buckets",
    ],
)
def test_report_equals_by_hand_gradients(found, name):
    assert_by_hand(found[0][name])


@pytest.mark.parametrize("name", ["no_sync", "no_sync, bucket views", "no_sync, recorded outside"])
def test_each_micro_batch_of_each_rank_has_its_own_loss_and_gradient_norm(found, name):
    losses, norms = found[0][name]["micro"]

    for rank in found[:3]:
        report = rank[name]["report"]
        np.testing.assert_allclose(report["micro_loss"], losses, rtol=1e-6)
        # Differences of sums in float32.
        np.testing.assert_allclose(report["micro_grad_norm"], norms, rtol=1e-5)


def test_micro_batches_take_no_message_of_their_own_after_the_first_step(found):
    scenario = found[0]["no_sync, uneven"]

    assert scenario["messages"] == [2, 1, 1]
    for name in ("micro_loss", "micro_grad_norm"):
        values = np.array(scenario["report"][name])
        assert np.isnan(values).tolist() == [[False] * 3] * 2 + [[True, False, False]]


def test_a_step_of_one_backward_pass_has_no_micro_batches(found):
    assert found[0]["two ranks"]["report"]["micro_loss"] == ()


@pytest.mark.parametrize(
    "name", ["two ranks", "bucket views", "no_sync", "fp16 hook", "powerSGD hook, several buckets"]
)
def test_buckets_re_formed_before_the_step_that_is_compared(found, name):
    first, rebuilt = found[0][name]["buckets"]

    assert len(rebuilt) > 1
    assert rebuilt != first
    assert sum(rebuilt) == 4 * found[0][name]["gradients"].shape[1]  # bytes of a float32


def test_the_mean_that_is_compared_is_what_powersgd_left_of_it(found):
    scenario = found[0]["powerSGD hook, several buckets"]
    exact = scenario["gradients"].mean(0)

    assert (scenario["mean"] - exact).norm() > 0.1 * exact.norm()


@pytest.mark.slow
def test_report_equals_by_hand_gradients_of_a_compiled_model(tmp_path):
    run_script("ddp_scenarios.py", tmp_path, "compiled")

    assert_by_hand(torch.load(tmp_path / "rank0.pt", weights_only=False)["compiled"])


def test_report_equals_by_hand_gradients_under_a_loss_scaler(found):
    scenario = found[0]["loss scaler"]

    assert_by_hand(scenario)


@pytest.mark.parametrize("name", ["two ranks", "three ranks", "four ranks", "loss scaler"])
def test_noise_scale_equals_its_definition_by_hand(found, name):
    gradients = found[0][name]["gradients"]
    variance = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - variance / len(gradients)
    expected = (variance / signal) if signal > 0 else torch.inf

    # The difference in the denominator takes some digits.
    np.testing.assert_allclose(found[0][name]["report"]["noise_scale"], expected, rtol=1e-4)


def test_every_rank_has_the_same_report(found):
    for name in ("four ranks", "two ranks"):
        reports = [rank[name]["report"] for rank in found if name in rank]
        assert reports == [reports[0]] * len(reports)


@pytest.mark.parametrize("name", ["harmless", "harmless, four ranks"])
def test_training_is_bitwise_unchanged(found, name):
    assert torch.equal(found[0][name]["with"], found[0][name]["without"])


def test_a_backward_pass_waits_for_no_number(found):
    assert [backward for backward, _ in found[0]["waiting"]] == [0, 0, 0]


def test_intervals_choose_the_measured_steps_and_the_pairs(found):
    first, second, third, fourth, fifth = found[0]["intervals"]

    assert (second, fourth) == (None, None)
    assert (first[0], third[0], fifth[0]) == (0, 2, 4)
    assert np.isfinite([first[1], fifth[1]]).all()
    assert np.isnan(third[1])


def test_a_rank_with_a_nan_loss_is_named_at_once_and_once(found):
    assert found[0]["non-finite"] == [[], ["rank 2: loss not finite since step 1"], []]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("drifted", "rank 3: checksum of the parameters differs from the other replicas"),
        (
            "drifted, two ranks",
            "ranks 0 and 1: the replicas differ in the checksum of the parameters",
        ),
    ],
)
def test_a_replica_whose_weights_moved_by_one_bit_is_named_at_the_next_step_and_once(
    found, name, message
):
    before, at, after = found[0][name][:3], found[0][name][3], found[0][name][4:]

    assert not any(before + after)
    assert len(at) == 1
    assert at[0].startswith(message)
    assert "since step 3" in at[0]


def test_a_rank_with_a_scaled_loss_is_named_alone(found):
    ((rank, step),) = found[0]["scaled loss"]

    assert rank == 2
    assert 10 <= step <= 10 + 25


@pytest.mark.slow
def test_a_rank_that_dies_leaves_the_other_no_longer_than_the_group_timeout(tmp_path):
    run_script("dying_rank.py", tmp_path, "metrics")

    assert float((tmp_path / "raised").read_text()) < 5 + 2


def make_batches(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 8, 4, generator=generator)


def accumulate(metrics, model, batches, scale=1.0):
    """Run the backward passes of one step and return their last report."""
    for batch in batches:
        loss = model(batch).square().mean()
        (scale * loss / len(batches)).backward()
        report = metrics.record(loss)
    return report


def test_micro_batches_are_the_workers_of_a_single_process():
    model = nn.Linear(4, 3)
    batches = make_batches(3)
    losses, gradients = [], []
    for batch in batches:
        loss = model(batch).square().mean()
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.detach())
        gradients.append(torch.cat([grad.flatten() for grad in gradient]).double())
    gradients = torch.stack(gradients)

    report = accumulate(WorkerMetrics(model, micro_batches=3), model, batches)

    scenario = {"report": vars_of(report), "losses": torch.stack(losses).double()}
    assert_by_hand({**scenario, "gradients": gradients, "mean": gradients.mean(0)})


def vars_of(report):
    return {**report.record(), "events": report.events}


def test_micro_batches_are_unscaled():
    class Scaler:
        def get_scale(self):
            return 64.0

    model = nn.Linear(4, 3)
    batches = make_batches(2)
    plain = accumulate(WorkerMetrics(model, micro_batches=2), model, batches)
    model.zero_grad()

    metrics = WorkerMetrics(model, micro_batches=2, scaler=Scaler())
    scaled = accumulate(metrics, model, batches, scale=64.0)

    np.testing.assert_allclose(scaled.grad_norm, plain.grad_norm, rtol=1e-6)


def test_the_caller_may_end_a_step_early():
    model = nn.Linear(4, 3)
    metrics = WorkerMetrics(model, micro_batches=4)
    reports = []
    for index, batch in enumerate(make_batches(2)):
        loss = model(batch).square().mean()
        loss.backward()
        reports.append(metrics.record(loss, is_last=index == 1))

    assert reports[0] is None
    assert len(reports[1].loss) == 2


def test_a_lone_worker_is_reported_without_dispersion():
    model = nn.Linear(4, 3)

    report = accumulate(WorkerMetrics(model), model, make_batches(1))

    assert report.grad_norm_std == 0
    assert np.isnan(report.pairwise_cosine)


def test_detached_metrics_leave_no_hook_behind(found):
    assert found[0]["hooks left"] == 0


def test_run_log_has_a_workers_record_a_step_with_lists_per_worker(tmp_path):
    model = nn.Linear(4, 3)
    metrics = WorkerMetrics(model, micro_batches=2, run_dir=tmp_path)
    for _ in range(3):
        model.zero_grad()
        report = accumulate(metrics, model, make_batches(2))
    metrics.detach()

    header, *records = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert header["world_size"] == 2
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[-1]["kind"] == "workers"
    assert records[-1]["grad_norm"] == list(report.grad_norm)


def test_state_goes_on_from_the_same_step():
    model = nn.Linear(4, 3)
    first = WorkerMetrics(model, micro_batches=2)
    accumulate(first, model, make_batches(2))
    second = WorkerMetrics(model, micro_batches=2)

    second.load_state_dict(first.state_dict())
    model.zero_grad()

    assert accumulate(second, model, make_batches(2)).step == 1


@pytest.mark.parametrize("name", ["every", "pairwise_every", "micro_batches", "num_examples"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` of at least 1, got 0"):
        WorkerMetrics(nn.Linear(2, 2), **{name: 0})
