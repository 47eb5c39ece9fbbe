"""Which worker is off: the order's evidence against exact counts, and planted faults."""

import itertools
import json
import math

import numpy as np
import pytest

from safestep.workers.drift import WorkerWatch, _log_likelihood_ratio


def draw(num_workers, steps, seed=0):
    """Return like workers' losses, norms and cosines, [steps, 3, N]: heavy tails, drifting."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(2, (steps, 3, num_workers))
    values *= np.linspace(1, 0.01, steps)[:, None, None]  # training goes on
    values[:, 1] = np.exp(generator.normal(0, 1, (steps, num_workers)) - 0.01 * values[:, 0])
    return values


def watch_all(values, watch=None):
    """Return all events of a run."""
    watch = watch or WorkerWatch(values.shape[-1])
    return [event for step, row in enumerate(values) for event in watch.update(step, *row)]


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2), (0, 1, 1, 3, 4), (2, 2, 2), (0, 0, 5, 5)])
def test_evidence_averages_to_one_over_all_orders(values):
    """A likelihood ratio has mean 1 without a fault, whatever the distribution and the ties."""
    orders = np.array(list(itertools.permutations(values)), dtype=float)
    like = np.ones(len(values), dtype=bool)

    ratios = np.exp([_log_likelihood_ratio(order[None], like)[0] for order in orders])

    np.testing.assert_allclose(ratios.mean(0), 1)


def test_evidence_is_the_documented_ratio_of_places():
    ratios = np.exp(_log_likelihood_ratio(np.array([[4.0, 9.0, 1.0]]), np.ones(3, dtype=bool)))

    np.testing.assert_allclose(ratios, [[6 / 7, 12 / 7, 3 / 7]])  # N 2^-k / (2 - 2^(1-N))


@pytest.mark.parametrize("num_workers", [2, 4])
def test_like_workers_with_heavy_tails_raise_no_alarm_in_2000_steps(num_workers):
    assert watch_all(draw(num_workers, 2000)) == []


@pytest.mark.parametrize(("num_workers", "delay"), [(2, 57), (3, 31), (4, 23), (8, 13)])
@pytest.mark.parametrize("quantity", [0, 1, 2])
def test_a_worker_always_at_the_extreme_is_named_alone_and_once(num_workers, delay, quantity):
    values = draw(num_workers, 200)
    values[100:, quantity, -1] = values[100:, quantity].max(1) + 0.1

    (event,) = watch_all(values)

    assert event.rank == num_workers - 1
    assert 100 <= event.step <= 100 + delay
    # Chance may add steps of evidence before the onset; a shift so small does not show them.
    assert 70 <= event.since <= 100 + delay // 4


@pytest.mark.parametrize("num_workers", [4, 8])
def test_a_clear_fault_is_dated_at_its_first_step(num_workers):
    for seed in range(20):
        values = draw(num_workers, 200, seed)
        values[100:, 0, 0] += 20.0

        event = watch_all(values)[0]

        assert (event.rank, event.since) == (0, 100)


def test_a_slow_drift_is_dated_near_its_beginning():
    """Which part of a slope is still ordinary is a matter of choice: a quarter at most."""
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=(200, 3, 4))
        values[60:, 0, 0] += 0.3 * np.arange(140)

        (event, *_) = watch_all(values)

        assert event.rank == 0
        assert 40 <= event.since <= 60 + (event.step - 60) / 2


def test_a_worker_below_the_others_is_named():
    values = draw(4, 200)
    values[:, 0, 1] = values[:, 0].min(1) - 1

    (event,) = watch_all(values)

    assert event.rank == 1
    assert event.deviation < -1
    assert "rank 1: loss" in event.message
    assert "times the usual spread below the others since step 0" in event.message


def test_a_small_shift_is_named_in_time():
    values = draw(4, 1000)
    values[:, 0, 2] += 1.5 * np.linspace(1, 0.01, 1000)  # about one standard deviation of the core

    (event,) = watch_all(values)

    assert event.rank == 2


def test_two_of_five_workers_are_both_named():
    values = draw(5, 400)
    values[:, 0, 0] += 100
    values[:, 1, 3] *= 1e-6

    assert {event.rank for event in watch_all(values)} == {0, 3}


def test_of_two_workers_the_event_says_that_either_may_be_off():
    values = draw(2, 100)
    values[:, 0, 1] = values[:, 0, 0] + 1

    (event,) = watch_all(values)

    assert event.message.startswith("rank 1: loss")
    assert event.message.endswith("either may be the one that is off)")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("quantity", [0, 1])
def test_a_non_finite_worker_is_named_at_once_and_again_after_it_recovered(value, quantity):
    values = draw(3, 600)
    values[50:60, quantity, 1] = value
    values[50:60, 2] = math.nan  # the mean has no direction any more
    values[500, quantity, 1] = value

    first, second = watch_all(values)

    assert (first.step, first.since, first.rank) == (50, 50, 1)
    assert math.isnan(first.deviation)
    assert second.step == 500


def test_overflow_of_a_loss_scale_is_waited_for():
    values = draw(3, 60)
    values[:, 1, 0] = math.inf
    watch = WorkerWatch(3, non_finite_patience=20)

    (event,) = watch_all(values, watch)

    assert (event.step, event.since) == (20, 0)


def test_a_gradient_far_beyond_the_others_is_named_at_once():
    values = draw(4, 300)
    values[200, 1, 3] = 1e12

    (event,) = watch_all(values)

    assert event.step == 200
    assert "rank 3: gradient norm" in event.message


def test_a_fault_that_ended_is_forgotten_and_a_new_one_is_named():
    values = draw(4, 1000)
    values[100:200, 0, 2] += 100
    values[800:900, 0, 2] += 100

    events = watch_all(values)

    assert [(event.rank, event.step // 100) for event in events] == [(2, 1), (2, 8)]


def test_identical_workers_give_no_evidence_and_an_odd_one_stands_out():
    values = np.ones((300, 3, 4))
    assert watch_all(values) == []
    values[100:, 2, 1] = 0.9

    (event,) = watch_all(values)

    assert (event.rank, event.since) == (1, 100)
    assert event.message == "rank 1: cosine to the mean far below the others since step 100"


def test_state_goes_through_json_and_changes_nothing():
    values = draw(4, 200)
    values[90:, 1, 0] *= 1e3
    first = WorkerWatch(4)
    before = watch_all(values[:100], first)
    second = WorkerWatch(4)

    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [e for step in range(100, 200) for e in second.update(step, *values[step])]

    assert before + after == watch_all(values)


def test_state_of_another_number_of_workers_is_refused():
    with pytest.raises(ValueError, match="`state` of 3 workers, got 4"):
        WorkerWatch(3).load_state_dict(WorkerWatch(4).state_dict())
