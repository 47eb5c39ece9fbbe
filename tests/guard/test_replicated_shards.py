"""Replicas of shards are watched like replicas of whole models, over four real gloo processes."""

import pytest
import torch
from helpers.scripts import run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("replicated")
    run_script("replicated_shards.py", output, timeout=600)
    return [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("scenario", ["weights", "state", "pieces"])
def test_of_two_ranks_that_hold_one_shard_both_are_named_as_soon_as_one_drifts(ranks, scenario):
    """Rank 3 moves; under HSDP and under tensor parallelism in DDP rank 1 holds the same."""
    first = ranks[0][scenario]["events"][0]

    assert (first["step"], first["quantity"]) == (6, "update")
    assert first["message"].startswith("ranks 1 and 3: the replicas differ in the update")
    assert "which one is off cannot be told" in first["message"]
    assert len(ranks[0][scenario]["warnings"]) == len(ranks[0][scenario]["events"])
    assert not ranks[1][scenario]["warnings"]


def test_of_four_ranks_that_hold_one_shard_the_majority_decides(ranks):
    (event,) = ranks[0]["majority"]["events"]

    assert (event["step"], event["rank"]) == (6, 3)
    assert event["message"].startswith("rank 3: update differs from the other replicas")


@pytest.mark.parametrize("scenario", ["state", "one bit", "pieces"])
def test_checksums_of_shards_confirm_the_drift_at_the_interval(ranks, scenario):
    events = ranks[0][scenario]["events"]

    assert ("checksum of the parameters", 7, 1) in [
        (event["quantity"], event["step"], event["rank"]) for event in events
    ]


def test_replicas_of_shards_that_started_from_other_weights_are_named_at_the_first_step(ranks):
    """``fully_shard`` leaves it to the user to begin with the same weights everywhere."""
    (event,) = ranks[0]["another start"]["events"]

    assert event["step"] == 0
    assert event["message"].startswith("ranks 0 and 1 and 2 and 3: the replicas differ")


def test_equal_replicas_of_shards_make_no_event(ranks):
    assert not ranks[0]["clean"]["events"]


def test_a_stage_that_is_guarded_alone_counts_each_of_its_shards_once(ranks):
    """The ranks of the stage are a slice of a mesh whose other ranks hold something else."""
    for found in ranks:
        for name in ("step_norm", "normalized_step", "gradient_ratio"):
            whole = [report[name] for report in found["whole"]["reports"][:3]]
            stage = [report[name] for report in found["stage"]["reports"][:3]]
            assert stage == pytest.approx(whole, rel=1e-5)


def test_clean_training_of_replicated_shards_raises_no_alarm(tmp_path):
    """In bfloat16, with accumulation and with clipped gradients too."""
    run_script("replicated_shards.py", tmp_path, 40, timeout=600)
    found = torch.load(tmp_path / "rank0.pt", weights_only=False)

    assert [len(scenario["reports"]) for scenario in found.values()] == [40] * 4
    assert [scenario["events"] for scenario in found.values()] == [[]] * 4
