"""Worker metrics of fully_shard over real gloo processes, beside gradients of plain copies."""

import itertools

import numpy as np
import pytest
import torch
from helpers.scripts import run_script


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda ranks: f"{ranks}-ranks",
)
def ranks(request, tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("sharded-workers")
    run_script("sharded_workers.py", output, request.param)
    return [torch.load(output / f"rank{rank}.pt") for rank in range(request.param)]


def cosine(left, right):
    return left @ right / (np.linalg.norm(left) * np.linalg.norm(right))


@pytest.mark.parametrize(
    ("scenario", "rtol"),
    [
        ("plain", 1e-5),
        ("accumulated", 1e-5),
        ("scaled", 1e-5),
        ("every second", 1e-5),
        ("float16 reduction", 2e-3),
    ],
)
def test_sharded_report_equals_by_hand_gradients(ranks, scenario, rtol):
    for found in ranks:
        reports, references = found[scenario]["reports"], found[scenario]["references"]
        for report, (losses, gradients, _) in zip(reports, references, strict=False):
            if report is None:
                continue
            gradients, mean = gradients.numpy(), gradients.mean(0).numpy()
            pairs = itertools.combinations(gradients, 2)
            expected = {
                "loss": losses[:, 0].numpy(),
                "grad_norm": np.linalg.norm(gradients, axis=1),
                "cosine_to_mean": [cosine(gradient, mean) for gradient in gradients],
                "pairwise_cosine": np.mean([cosine(*pair) for pair in pairs]),
            }
            for name, value in expected.items():
                np.testing.assert_allclose(
                    report[name], value, rtol=rtol, atol=rtol, err_msg=f"{scenario} {name}"
                )


@pytest.mark.parametrize("scenario", ["accumulated", "each reduced"])
def test_each_micro_batch_of_each_shard_has_its_loss_and_its_norm_where_a_rank_sees_it(
    ranks, scenario
):
    for found in ranks:
        reports, references = found[scenario]["reports"], found[scenario]["references"]
        for report, (losses, _, micro) in zip(reports, references, strict=False):
            expected, norms = micro.permute(2, 1, 0).numpy()
            np.testing.assert_allclose(report["loss"], losses[:, 0])
            np.testing.assert_allclose(report["micro_loss"], expected)
            if scenario == "accumulated":
                assert np.isnan(report["micro_grad_norm"]).all()
                continue
            np.testing.assert_allclose(report["micro_grad_norm"], norms, rtol=1e-5)
            # Only each micro-batch's own gradient is known: the step's is that of the last.
            np.testing.assert_allclose(report["grad_norm"], norms[-1], rtol=1e-5)


def test_sharded_reports_are_the_same_on_every_rank_and_there_at_the_measured_steps(ranks):
    for found in ranks:
        assert found["plain"]["reports"] == ranks[0]["plain"]["reports"]
        assert [report is None for report in found["every second"]["reports"]] == [
            False, True, False,
        ]  # fmt: skip


def test_sharded_training_is_bitwise_the_same_with_and_without_metrics(ranks):
    for found in ranks:
        for name, value in found["unwatched"].items():
            assert torch.equal(found["plain"]["after"][name], value)


def test_metrics_of_gradients_that_are_nowhere_whole_are_refused_with_the_reason(ranks):
    assert "replicas of shards" in ranks[0]["refused"]["hybrid"]
    assert "tensor parallelism alone" in ranks[0]["refused"]["tensor"]
