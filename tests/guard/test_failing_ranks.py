"""A rank that fails where all run the model together holds the others up no longer than it must."""

import json

import pytest
from helpers.scripts import run_script

pytestmark = pytest.mark.slow
FAULTY = 1  # the step, as in raising_piece.py
TIMEOUT = 5 + 5  # seconds, of the group, and for a busy machine


@pytest.fixture
def ranks(request, tmp_path):
    """What happened to each rank, step by step."""
    run_script("raising_piece.py", tmp_path, request.param, timeout=180)
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("ranks", ["calls"], indirect=True)
def test_no_rank_measures_a_step_that_one_of_them_cannot(ranks):
    """It would wait for that rank until the group's timeout, and the group would be lost."""
    for found in ranks:
        assert [entry["status"] for entry in found] == ["ok", "unmeasured", "ok", "ok"]
        reason = found[FAULTY]["reason"]
        assert reason.startswith("rank 0: another rank cannot run the model again; rank 1: no ")


@pytest.mark.parametrize("ranks", ["after"], indirect=True)
def test_a_rank_that_raises_last_does_not_turn_to_another_estimator_alone(ranks):
    """Its next collectives would answer those of the others, which are about something else."""
    for found in ranks:
        assert [entry["status"] for entry in found] == ["ok", "unmeasured", "ok", "ok"]
        assert found[FAULTY]["reason"] == "rank 1: labels are gone"
        assert {entry["estimator"] for entry in found} == {"jvp"}


@pytest.mark.parametrize("ranks", ["forward"], indirect=True)
def test_ranks_that_all_lack_a_derivative_turn_to_a_difference_at_that_step(ranks):
    for found in ranks:
        assert {(entry["status"], entry["estimator"]) for entry in found} == {("ok", "difference")}


@pytest.mark.parametrize("ranks", ["before"], indirect=True)
def test_ranks_raise_within_the_timeout_what_they_waited_for(ranks):
    for found in ranks:
        last = found[FAULTY]
        assert last["seconds"] < TIMEOUT
        assert last["is_unmoved"]
        assert "expected each of 2 ranks to run the model again at step 1" in last["error"]
        assert "rank 1: labels are gone" in last["error"]


def test_ranks_of_shards_raise_within_the_timeout_what_they_waited_for(tmp_path):
    """The others wait in a gather that rank 1 never joins: with its timeout their group is lost."""
    run_script("raising_shard.py", tmp_path, timeout=180)

    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["seconds"] < TIMEOUT
        assert "ranks to run the model again at step 0" in found["error"]
        assert "rank 1: KeyError: 'labels are gone'" in found["error"]
