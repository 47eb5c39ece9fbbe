"""SafeStep on ranks that are not alike, over real gloo processes: said, or followed."""

import json

import pytest
import torch
from helpers.scripts import run_script


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("differing")
    run_script("differing_ranks.py", output)
    return [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("action", "same `action` on every rank, got clip on ranks 0, 2 and monitor on rank 1"),
        ("limit", "same `max_normalized_step` on every rank, got 1.0 on rank 0 and 0.5 on ranks"),
        ("copy", "same `copy` on every rank, got True on ranks 0, 1 and False on rank 2"),
        ("estimator", "same `estimator` on every rank, got jvp on rank 0 and auto on ranks 1, 2"),
        ("optimizer", "same `optimizer` on every rank, got Adam on ranks 0, 1 and SGD on rank 2"),
        ("shape", "got at place 0 0.weight (8, 6) on ranks 0, 1 and 0.weight (9, 6) on rank 2"),
        ("names", "got at place 0 0.weight (8, 6) on ranks 0, 1 and first.weight (8, 6) on rank"),
        ("resumed", "same `number of steps so far` on every rank, got 0 on ranks 0, 2 and 40"),
    ],
)
def test_ranks_that_were_set_up_differently_raise_before_their_first_step(ranks, scenario, message):
    for found in ranks:
        assert message in found[scenario]


def test_ranks_that_were_set_up_alike_train(ranks):
    assert [found["alike"] for found in ranks] == [None] * 3


@pytest.mark.parametrize("scenario", ["joined", "joined, scaled"])
def test_uneven_data_within_join_train_bitwise_as_without_a_guard_that_only_watches(
    ranks, scenario
):
    for found in ranks:
        unguarded = found[f"{scenario}, unguarded"]["after"]
        for name, value in found[scenario]["after"].items():
            assert torch.equal(value, unguarded[name])


def test_ranks_without_data_let_the_others_be_measured_and_go_on_with_their_count(ranks):
    counts = (4, 7, 5)
    for found, count in zip(ranks, counts, strict=True):
        assert found["joined"]["reports"] == [(step, "ok") for step in range(count)]
        again = found["joined, then on"]["reports"]
        assert again[count:] == [(7 + step, "ok") for step in range(count)] + [
            (14, "ok"), (15, "ok"),
        ]  # fmt: skip
        assert not found["joined"]["has_hook"]


def test_a_step_that_a_scaler_leaves_out_keeps_no_rank_without_data_waiting(ranks):
    steps = [[step for step, _ in found["joined, scaled"]["reports"]] for found in ranks]

    assert steps == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 3, 4]]


def test_a_rank_without_any_data_in_the_first_epoch_takes_part_in_the_second(ranks):
    counts = [len(found["joined, none at first"]["reports"]) for found in ranks]
    last = [found["joined, none at first"]["reports"][-1] for found in ranks]

    assert counts == [0 + 0 + 2, 3 + 3 + 2, 2 + 2 + 2]
    assert last == [(7, "ok")] * 3


@pytest.mark.parametrize("scenario", ["weights", "momentum"])
def test_a_replica_that_drifts_is_named_in_the_log_and_a_warning_at_that_step(ranks, scenario):
    first = ranks[0][scenario]["events"][0]

    assert (first["step"], first["rank"], first["quantity"]) == (6, 2, "update")
    assert first["message"].startswith("rank 2: update differs from the other replicas")
    assert len(ranks[0][scenario]["warnings"]) == len(ranks[0][scenario]["events"])
    assert not ranks[1][scenario]["warnings"]


def test_checksums_at_an_interval_confirm_what_has_drifted(ranks):
    events = ranks[0]["momentum"]["events"][1:]

    assert [(event["step"], event["rank"]) for event in events] == [(7, 2), (7, 2)]
    assert {event["quantity"] for event in events} == {
        "checksum of the parameters", "checksum of the optimizer state",
    }  # fmt: skip


def test_a_checksum_sees_one_bit_at_the_interval(ranks):
    events = ranks[0]["one bit"]["events"]

    assert ("checksum of the parameters", 7, 2) in [
        (event["quantity"], event["step"], event["rank"]) for event in events
    ]


def test_of_two_replicas_that_differ_both_are_named(ranks):
    (event,) = ranks[0]["two replicas"]["events"]

    assert event["step"] == 6
    assert event["message"].startswith("ranks 0 and 1: the replicas differ in the update")


def test_replicas_that_are_alike_make_no_event(ranks):
    assert not ranks[0]["clean"]["events"]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "step"), [("unguarded", 0), ("ends", 2)])
def test_a_rank_that_does_not_take_part_is_waited_for_no_longer_than_the_timeout(
    tmp_path, fault, step
):
    run_script("lone_guard.py", tmp_path, fault)
    found = json.loads((tmp_path / "rank0.json").read_text())

    assert found["seconds"] < 5 + 2
    assert found["is_unmoved"]
    assert f"at step {step}, got nothing from at least one" in found["error"]
    waited = {
        "unguarded": "its options, parameter names and shapes",
        "ends": "the norms of its update",
    }
    assert f"expected each of 2 ranks to send {waited[fault]}" in found["error"]
