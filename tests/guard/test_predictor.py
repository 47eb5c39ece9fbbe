"""When the exact radius is spared, and when it is not."""

import json
import random
from itertools import groupby, pairwise

import pytest

from safestep.guard.predictor import (
    AUDIT_INTERVAL,
    FAR,
    FIRST_STEPS,
    JUMP,
    LONGEST_INTERVAL,
    MARGIN,
    NEAR,
    OUTLIER,
    SECANTS,
    WINDOW,
    Measure,
    Predictor,
    _Window,
)

OPTIONS = (3, 1.0)


def train(predictor, r, steps, step_norm=0.1, signal=1.0, options=OPTIONS):
    """Make steps of one length and r, and return the numbers of those that were measured."""
    return [step for step, _ in looked(predictor, r, steps, step_norm, signal, options)]


def looked(predictor, r, steps, step_norm=0.1, signal=1.0, options=OPTIONS):
    """Make steps of one length and r, and return the numbers of those that were measured, and how.

    The secants find r, too.
    """
    measured = []
    for step in range(steps):
        answer = predictor.predict(step_norm, [signal], options)
        if isinstance(answer, Measure):
            predictor.learn(step_norm, r, is_exact=answer is Measure.EXACTLY)
            measured.append((step, "exact" if answer is Measure.EXACTLY else "secant"))
    return measured


@pytest.mark.parametrize(
    ("r", "longest"),
    [(0.7, 27), (NEAR / MARGIN + 1e-3, AUDIT_INTERVAL), (0.2, 172), (0.01, LONGEST_INTERVAL)],
    ids=str,
)
def test_measurements_grow_rare_as_far_as_r_is_from_the_limit(r, longest):
    predictor = Predictor(1.0)

    measured = train(predictor, r, 2000)

    gaps = [later - earlier for earlier, later in pairwise(measured)]
    assert measured[:FIRST_STEPS] == list(range(FIRST_STEPS))
    assert max(gaps) == gaps[-1] == longest


def test_prediction_is_in_proportion_to_the_step_distance():
    predictor = Predictor(1.0)
    train(predictor, 0.2, 80)

    assert predictor.predict(0.12, [1.0], OPTIONS).normalized_step == pytest.approx(0.24)


@pytest.mark.parametrize(
    ("step_norm", "signal", "options"),
    [
        (0.1 * JUMP * 1.01, 1.0, OPTIONS),
        (0.1, JUMP * 1.01, OPTIONS),
        (0.1, float("nan"), OPTIONS),
        (0.1, 1.0, (2, 1.0)),
    ],
    ids=["longer step", "larger gradient", "gradient not finite", "frozen parameters"],
)
def test_unusual_step_is_measured(step_norm, signal, options):
    predictor = Predictor(1.0)
    train(predictor, 0.01, 100)

    assert predictor.predict(0.1, [1.0], OPTIONS) is not Measure.EXACTLY
    assert predictor.predict(step_norm, [signal], options) is Measure.EXACTLY


@pytest.mark.parametrize("signal", [float("inf"), float("nan")], ids=str)
def test_what_was_not_finite_does_not_count_as_usual(signal):
    predictor = Predictor(1.0)
    train(predictor, 0.01, 100)
    assert predictor.predict(0.1, [signal], OPTIONS) is Measure.EXACTLY  # the step was not taken

    assert predictor.predict(0.1, [1.0], OPTIONS) is not Measure.EXACTLY
    assert predictor.predict(0.1, [JUMP * 1.01], OPTIONS) is Measure.EXACTLY


def test_signal_that_creeps_up_is_measured_at_every_doubling():
    predictor, measured = Predictor(1.0), []
    train(predictor, 0.01, 400)

    for step in range(300):
        signal = 1.01**step
        if predictor.predict(0.1, [signal], OPTIONS) is Measure.EXACTLY:
            predictor.learn(0.1, 0.01)
            measured.append(signal)

    assert all(later <= 2.05 * earlier for earlier, later in pairwise([1.0, *measured]))


def test_step_that_the_margin_puts_over_the_limit_is_measured():
    predictor = Predictor(1.0)

    assert len(train(predictor, 1.01 / MARGIN, 100)) == 100


def test_where_r_is_between_far_and_near_seven_of_eight_measurements_are_secants():
    exact_and_secants = [
        (how, len(list(group)))
        for how, group in groupby(how for _, how in looked(Predictor(1.0), 0.5, 2000))
    ]

    first, *others = exact_and_secants
    assert first == ("exact", FIRST_STEPS)
    assert others[:4] == [("secant", SECANTS), ("exact", 1)] * 2


@pytest.mark.parametrize("r", [0.9 * FAR, 1.1 * NEAR], ids=["far from the limit", "near it"])
def test_where_r_is_elsewhere_measurements_are_exact(r):
    assert {how for _, how in looked(Predictor(1.0), r, 1000)} == {"exact"}


@pytest.mark.parametrize("limit", [1.0, 0.5, 3.0])
def test_a_secant_settles_nothing_that_is_near_the_limit(limit):
    predictor = Predictor(limit)

    assert predictor.suffices(0.99 * NEAR * limit, Measure.QUICKLY)
    assert not predictor.suffices(1.01 * NEAR * limit, Measure.QUICKLY)
    assert not predictor.suffices(float("nan"), Measure.QUICKLY)


def test_where_long_steps_may_pass_secants_look_at_them_too_and_change_no_prediction_of_r():
    predictor = Predictor(1.0, passes_long_steps=True)
    measured = looked(predictor, 3.0, FIRST_STEPS + 2 * (SECANTS + 1))
    factors = predictor.state_dict()["factors"]

    assert [how for _, how in measured][FIRST_STEPS:] == [*["secant"] * SECANTS, "exact"] * 2
    assert len(factors) == FIRST_STEPS + 2


def test_where_long_steps_may_pass_r_is_no_reason_to_measure_unless_they_are_held():
    predictor = Predictor(1.0, passes_long_steps=True)
    for _ in range(FIRST_STEPS):
        predictor.predict(0.1, [1.0], OPTIONS)
        predictor.learn(0.1, 3.0, 0.2)

    assert predictor.predict(0.1, [1.0], OPTIONS).normalized_step == pytest.approx(3.0)
    assert predictor.predict(0.1, [1.0], OPTIONS, is_held=True) is Measure.QUICKLY
    predictor.learn(0.1, 3.0, 0.9)  # with the margin, over the limit
    assert predictor.predict(0.1, [1.0], OPTIONS) is Measure.QUICKLY


def test_largest_of_many_measurements_bounds_r_and_the_latest_predict_it():
    predictor = Predictor(0.36)
    train(predictor, 0.1, FIRST_STEPS)
    predictor.learn(0.1, 0.25)  # with the margin, 0.35
    for _ in range(WINDOW - 1):  # too few to forget it
        predictor.learn(0.1, 0.1)

    assert predictor.predict(0.1, [1.0], OPTIONS).normalized_step == pytest.approx(0.1)
    assert predictor.predict(0.105, [1.0], OPTIONS) is Measure.QUICKLY
    predictor.learn(0.1, 0.1)
    assert predictor.predict(0.105, [1.0], OPTIONS).normalized_step == pytest.approx(0.105)


def test_bad_batch_is_forgotten_when_the_latest_measurements_are_far_below_it():
    predictor = Predictor(1.0)
    train(predictor, 0.1, FIRST_STEPS)
    predictor.learn(0.1, 3 * 0.1 * OUTLIER)
    for _ in range(4):
        assert predictor.predict(0.1, [1.0], OPTIONS) is Measure.EXACTLY
        predictor.learn(0.1, 0.1)

    assert predictor.predict(0.1, [1.0], OPTIONS).normalized_step == pytest.approx(0.1)


def test_prediction_that_fell_short_is_followed_by_measurements_and_a_wider_margin():
    predictor = Predictor(1.0)
    train(predictor, 0.05, 400)

    predictor.learn(0.1, 0.21)

    assert [predictor.predict(0.1, [1.0], OPTIONS) for _ in range(4)][-1] is Measure.QUICKLY
    assert predictor.state_dict()["margin"] > 4


def test_measurements_grow_rare_again_after_a_prediction_that_fell_short():
    predictor = Predictor(1.0)
    train(predictor, 0.005, 1000)
    predictor.learn(0.1, 0.01)

    measured = train(predictor, 0.01, 2000)

    assert measured[0] == LONGEST_INTERVAL // 8 - 1
    assert measured[-1] - measured[-2] == LONGEST_INTERVAL


def test_state_survives_json_and_goes_on_alike_unless_options_are_others():
    one, other = Predictor(1.0), Predictor(1.0)
    train(one, 0.2, 123)

    other.load_state_dict(json.loads(json.dumps(one.state_dict())))

    assert other.state_dict() == one.state_dict()
    assert other.predict(0.1, [1.0], OPTIONS) == one.predict(0.1, [1.0], OPTIONS)
    assert other.predict(0.1, [1.0], (4, 1.0)) is Measure.EXACTLY


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_a_window_knows_the_largest_of_the_rows_that_are_left(size):
    rng = random.Random(size)
    rows = [(rng.gauss(0, 1), 100.0 - index, float(index)) for index in range(200)]
    window = _Window(size)
    for index, row in enumerate(rows):
        window.append(row)

        left = rows[max(0, index + 1 - size) : index + 1]
        assert window.largest == tuple(map(max, zip(*left, strict=True)))
        assert _Window(size, window.state()).largest == window.largest
