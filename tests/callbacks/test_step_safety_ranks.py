"""StepSafety on the ranks of a Trainer: real processes, one decision, the same bits everywhere."""

import subprocess
import sys

import pytest
import torch
from helpers.scripts import PROCESSES, run_script

from safestep import read_run

SCRIPT = PROCESSES / "guarded_trainer.py"
SCALED_FROM = 20
WATCHED = [
    "plain",
    "find_unused_parameters",
    "static_graph",
    "accumulated",
    "manual",
    "bf16",
    "scaled",
    "compiled",
]


def train(output, num_ranks, *names):
    """Run scenarios and return what each rank saw in them."""
    run_script(SCRIPT, output, num_ranks, *names, timeout=180)
    return {
        folder.name: [torch.load(folder / f"rank{rank}.pt") for rank in range(num_ranks)]
        for folder in output.iterdir()
        if folder.name != "checkpoints"
    }


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """What the ranks saw with a guard that only watches; one start for all scenarios."""
    return train(tmp_path_factory.mktemp("watched"), 2, *WATCHED)


def assert_same_bits(one, other, *, but=()):
    assert one.keys() == other.keys()
    for name in one:
        if not any(part in name for part in but):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)], ids=lambda n: f"{n}-ranks"
)
def test_step_safety_clips_alike_on_all_ranks_and_shares_one_run_log(tmp_path, num_ranks):
    first, *others = train(tmp_path, num_ranks, "clipped")["clipped"]

    for other in others:
        assert [report["scale"] for report in other["reports"]] == [
            report["scale"] for report in first["reports"]
        ]
        assert_same_bits(first["after"], other["after"], but=["running"])
    assert {report["status"] for report in first["reports"]} == {"clipped"}
    assert {"safestep/normalized_step", "workers/loss_std"} <= first["logged"].keys()
    (path,) = tmp_path.rglob("run.jsonl")
    run = read_run(path)
    assert run.header["world_size"] == num_ranks
    assert len(run.steps["scale"]) == len(first["reports"]) > 0
    assert run.workers["loss"].shape == (len(first["reports"]), num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", WATCHED)
def test_step_safety_that_only_watches_leaves_ranks_bitwise_alone(watched, scenario):
    for guarded, unguarded in zip(watched[scenario], watched[f"{scenario} unguarded"], strict=True):
        assert {report["status"] for report in guarded["reports"]} == {"ok"}
        assert_same_bits(guarded["after"], unguarded["after"])


@pytest.mark.slow
def test_step_safety_measures_a_compiled_module_on_ranks_like_an_eager_one(watched):
    for compiled, eager in zip(watched["compiled"], watched["plain"], strict=True):
        found = [report["normalized_step"] for report in compiled["reports"]]
        expected = [report["normalized_step"] for report in eager["reports"]]
        # Compiled arithmetic may round differently, and the weights drift apart by that.
        assert found == pytest.approx(expected, rel=1e-4)
        # Only the eager step logs its loss: the other one really was compiled.
        assert "loss" in eager["logged"]
        assert "loss" not in compiled["logged"]


@pytest.mark.slow
def test_step_safety_resumes_bitwise_on_ranks(tmp_path):
    found = train(tmp_path, 2, "resumed")

    for resumed, whole in zip(found["resumed"], found["uninterrupted"], strict=True):
        assert [report["step"] for report in resumed["reports"]] == [4, 5, 6, 7]
        later, expected = (
            [report | {"seconds": 0.0} for report in run["reports"]] for run in (resumed, whole)
        )
        assert later == expected[4:]
        assert "clipped" in {report["status"] for report in resumed["reports"]}
        assert_same_bits(resumed["after"], whole["after"], but=["running"])  # saved by rank 0 alone


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """What the ranks saw where rank 1 has a fault; one start for all faults."""
    names = ["raises", "raises while clipped", "spoiled"]
    return train(tmp_path_factory.mktemp("faulty"), 2, *names)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["raises", "raises while clipped", "spoiled"])
def test_step_safety_decides_alike_on_all_ranks_where_one_has_a_fault(faulty, scenario):
    first, second = faulty[scenario]
    for field in ("status", "scale", "reason"):
        assert [r[field] for r in first["reports"]] == [r[field] for r in second["reports"]]
    assert_same_bits(first["after"], second["after"], but=["running"])


@pytest.mark.slow
def test_step_safety_names_the_rank_that_cannot_run_its_step_again(faulty):
    for scenario, status in (("raises", "unmeasured"), ("raises while clipped", "clipped")):
        reports = faulty[scenario][0]["reports"]
        assert len(reports) == 4
        assert {report["status"] for report in reports} == {status}
        assert all(r["reason"].startswith("rank 1: KeyError: 'labels are gone'") for r in reports)


@pytest.mark.slow
def test_step_safety_undoes_a_step_on_all_ranks_after_a_nan_on_one(faulty):
    reports = faulty["spoiled"][0]["reports"]

    assert [report["status"] for report in reports] == ["ok", "skipped", "ok", "ok"]
    weights = faulty["spoiled"][0]["after"]
    assert all(value.isfinite().all() for name, value in weights.items() if "running" not in name)


@pytest.mark.slow
def test_a_rank_that_went_nan_is_skipped_and_named_in_the_shared_run_log(tmp_path):
    reports = train(tmp_path, 2, "named")["named"][0]["reports"]

    assert [report["status"] for report in reports] == ["ok", "skipped", "ok", "ok"]
    (path,) = tmp_path.rglob("run.jsonl")
    events = [event for event in read_run(path).events if event["name"] == "worker"]
    assert [event["message"] for event in events] == ["rank 1: loss not finite since step 1"]


@pytest.mark.slow
def test_a_rank_with_a_scaled_loss_is_named_alone_in_the_run_log_of_a_trainer(tmp_path):
    train(tmp_path, 4, "off")

    (path,) = tmp_path.rglob("run.jsonl")
    events = [event for event in read_run(path).events if event["name"] == "worker"]
    assert {event["rank"] for event in events} == {1}
    assert SCALED_FROM <= events[0]["step"] <= SCALED_FROM + 25


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_at_once(tmp_path):
    """The group would wait half an hour; the time limit is that of a start of the processes."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "2", "dies"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode != 0
    assert "process 1 terminated with exit code 1" in done.stderr
