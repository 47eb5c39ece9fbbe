"""Which replica differs: the majority decides, and names a rank once."""

import math

import pytest
import torch

from safestep.workers.replicas import ReplicaWatch, odd_ones


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        ((1.0, 1.0, 1.0), []),
        ((1.0, 2.0, 1.0), [1]),
        ((2.0, 1.0, 1.0, 3.0, 1.0), [0, 3]),
        ((1.0, 2.0), [0, 1]),
        ((1.0, 2.0, 3.0, 1.0), [1, 2]),
        ((1.0, 1.0, 2.0, 2.0), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_odd_ones_differ_from_the_most_frequent_row(values, odd):
    assert odd_ones(rows(*values)) == odd


def test_each_rank_that_drifts_makes_one_event():
    watch = ReplicaWatch("update norm", is_trusted=True, has_size=True)
    updates = [(1, 1, 1, 1), (1, 1, 2, 1), (3, 3, 4, 3), (1, 2, 5, 1), (1, 2, 5, 1), (1, 1, 1, 1)]

    events = [watch.update(step, rows(*map(float, norms))) for step, norms in enumerate(updates)]

    found = [(event.step, event.rank) if event else None for event in events]
    assert found == [None, (1, 2), None, (3, 1), None, None]


def test_a_drift_of_several_ranks_names_them_all():
    watch = ReplicaWatch("update norm", is_trusted=True, has_size=True)

    event = watch.update(4, rows(1.0, 2.0, 1.0, 1.0, 3.0))

    assert event.message.startswith("ranks 1 and 4: update norm differ from the other replicas")


def test_ranks_that_never_agreed_are_no_replicas():
    watch = ReplicaWatch("update norm", is_trusted=False, has_size=True)

    assert watch.update(0, rows(1.0, 2.0)) is None
    assert watch.update(1, rows(1.0, 1.0)) is None
    assert watch.update(2, rows(1.0, 2.0)).step == 2


@pytest.mark.parametrize("absent", [math.inf, -math.inf])
def test_ranks_without_a_finite_number_do_not_take_part(absent):
    watch = ReplicaWatch("update norm", is_trusted=True, has_size=True)

    assert watch.update(0, rows(1.0, absent, 1.0)) is None
    assert watch.update(1, rows(1.0, absent, 2.0, 1.0)).rank == 2
    assert watch.update(2, rows(math.nan, 1.0, 1.0)) is None


def test_only_ranks_that_hold_one_shard_are_compared():
    watch = ReplicaWatch("update norm", is_trusted=True, has_size=True)
    shards = torch.tensor([0, 1, 0, 1, 0, 1], dtype=torch.float64)

    assert watch.update(0, rows(1.0, 2.0, 1.0, 2.0, 1.0, 2.0), shards) is None
    event = watch.update(1, rows(1.0, 2.0, 1.0, 3.0, 1.0, 2.0), shards)
    assert event.message.startswith("rank 3: update norm differs from the other replicas since")


def test_shards_of_two_replicas_name_both_after_those_that_a_majority_is_against():
    watch = ReplicaWatch("update norm", is_trusted=True, has_size=True)
    shards = torch.tensor([0, 1, 0, 1, 1], dtype=torch.float64)
    drifted = rows(1.0, 2.0, 4.0, 3.0, 2.0)

    events = [watch.update(step, drifted, shards) for step in range(3)]

    assert events[0].message.startswith("rank 3: update norm differs")
    assert events[1].message.startswith("ranks 0 and 2: the replicas differ in the update norm")
    assert "(by 75 %)" in events[1].message
    assert events[2] is None


def test_steps_that_move_nothing_make_no_replicas():
    """Ranks that train models of their own all begin a warm-up at a rate of zero."""
    watch = ReplicaWatch("update norm", is_trusted=False, has_size=True)

    assert watch.update(0, rows(0.0, 0.0)) is None
    assert watch.update(1, rows(1.0, 2.0)) is None
