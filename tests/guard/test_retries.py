"""When what could not be measured is tried again."""

import pytest

from safestep.guard.retries import FIRST_PAUSE, LONGEST_PAUSE, TRIES, TRIES_AFTER_ERRORS, Retries


def failing(times, is_error=False):
    retries = Retries()
    for _ in range(times):
        retries.fail("why", "a loss", is_error=is_error)
    return retries


def steps_skipped(retries):
    """Count the steps until the next attempt at the same loss."""
    steps = 0
    while not retries.is_due("a loss"):
        retries.skip()
        steps += 1
    return steps


@pytest.mark.parametrize(("tries", "is_error"), [(TRIES, False), (TRIES_AFTER_ERRORS, True)])
def test_pauses_begin_after_so_many_failures_and_grow(tries, is_error):
    assert steps_skipped(failing(tries - 1, is_error)) == 0
    retries = failing(tries - 1, is_error)
    pauses = []
    for _ in range(4):
        retries.fail("why", "a loss", is_error=is_error)
        pauses.append(steps_skipped(retries))
    assert pauses == [FIRST_PAUSE, 8 * FIRST_PAUSE, 64 * FIRST_PAUSE, LONGEST_PAUSE]


def test_asking_changes_nothing():
    retries = failing(TRIES)
    for _ in range(2 * FIRST_PAUSE):
        assert retries.is_pausing
        assert not retries.is_due("a loss")
        assert retries.is_due("another loss")
    assert steps_skipped(retries) == FIRST_PAUSE


def test_another_loss_begins_a_new_count():
    retries = failing(TRIES)
    retries.fail("another reason", "another loss", is_error=False)
    assert not retries.is_pausing
    assert retries.reason == "another reason"


def test_a_success_ends_the_count():
    retries = failing(TRIES)
    retries.succeed()
    retries.fail("why", "a loss", is_error=False)
    assert not retries.is_pausing


@pytest.mark.parametrize("counts", [True, False])
def test_an_attempt_counts_only_where_it_shows_what_the_next_may_do(counts):
    def measure():
        raise RuntimeError("out of memory")

    retries = Retries()
    with pytest.raises(RuntimeError, match="out of memory"):
        retries.attempt([], measure, counts=counts)
    assert (retries.reason is not None) == counts


def test_no_attempt_is_made_in_a_pause():
    retries = Retries()
    for _ in range(TRIES):
        retries.fail("why", frozenset(), is_error=False)
    for _ in range(FIRST_PAUSE):
        assert retries.attempt([], lambda: pytest.fail("was tried"), counts=True) is None
    assert retries.attempt([], lambda: "measured", counts=True) == "measured"
    assert retries.reason is None
