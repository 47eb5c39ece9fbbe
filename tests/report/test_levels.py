"""What the loss did after an event is told as it was: 60 histories whose truth is known."""

import numpy as np
import pytest

from safestep.report.levels import effect_of, last_rise

from .histories import EFFECTS, make_history

HISTORIES = [make_history(name, seed) for name in EFFECTS for seed in range(4)]


def judged(history):
    return effect_of(history.loss, history.first, history.last)


def test_no_loss_that_rose_is_called_unaffected():
    assert len(HISTORIES) == 60
    wrong = [h.name for h in HISTORIES if judged(h).kind == "held" and h.rise > h.material]

    assert wrong == []


def test_under_five_percent_of_the_losses_that_did_not_rise_are_called_damaged():
    calm = [history for history in HISTORIES if history.rise <= history.material]
    wrong = [history.name for history in calm if judged(history).has_risen]

    assert len(calm) >= 20
    assert len(wrong) < 0.05 * len(calm)


def test_loss_that_is_said_to_be_back_is_back():
    back = [history for history in HISTORIES if judged(history).kind == "back"]

    assert len(back) >= 8
    for history in back:
        effect = judged(history)
        assert history.final_rise <= history.material, history.name
        assert np.isfinite(history.loss[effect.back])
        assert history.loss[effect.back] < effect.before + 0.5 * (effect.peak - effect.before)


@pytest.mark.parametrize("name", ["shift", "held shift", "sparse shift", "slow rise"])
def test_clear_rise_that_stays_is_told_with_both_levels(name):
    clear = [make_history(name, seed) for seed in range(20)]
    clear = [history for history in clear if history.rise > 0.5 * history.signal[0]]

    assert len(clear) > 5
    for history in clear:
        effect = judged(history)
        assert effect.kind == "up"
        level = history.signal[history.first]
        assert effect.before == pytest.approx(level, abs=0.15 * level)
        assert effect.after == pytest.approx(level + history.rise, abs=0.15 * level)


@pytest.mark.parametrize(
    ("before", "after"), [(1.07, 1.6), (0.17, 0.33)], ids=["worker fault", "held spike"]
)
def test_half_as_high_again_is_no_unaffected_loss(before, after):
    rng = np.random.default_rng(0)
    loss = np.r_[np.full(200, before), np.full(200, after)] + 0.03 * rng.normal(size=400)

    effect = effect_of(loss, 199, 220)

    assert effect.kind == "up"
    assert (effect.before, effect.after) == pytest.approx((before, after), abs=0.02)


def test_loss_is_not_back_at_a_step_where_it_is_not_finite():
    loss = np.full(300, 1.0)
    loss[80:84] = np.inf
    loss[72:80] = 3.0

    effect = effect_of(loss, 71, 71)

    assert effect.kind == "back"
    assert effect.back == 84


def test_loss_that_stays_higher_after_a_partial_recovery_is_not_back():
    """Half of a jump is undone by step 371: the loss of .59 is not that of .40."""
    time = np.arange(500.0)
    loss = np.where(time <= 350, 0.40, 0.59 + 0.5 * np.exp(-(time - 351) / 8))

    effect = effect_of(loss, 350, 350)

    assert effect.kind == "up"
    assert effect.after == pytest.approx(0.59, abs=0.01)


EARLY = [
    make_history(name, seed, first=first) for name in EFFECTS for seed in range(8)
    for first in (0, 2, 5)
]  # fmt: skip


def test_no_rise_in_the_first_steps_is_called_unaffected():
    wrong = [h.name for h in EARLY if judged(h).kind == "held" and h.rise > h.material]

    assert wrong == []


def test_first_steps_that_did_no_damage_are_hardly_ever_said_to():
    calm = [history for history in EARLY if history.rise <= history.material]
    wrong = [history.name for history in calm if judged(history).has_risen]

    assert len(calm) > 60
    assert len(wrong) < 0.05 * len(calm)


@pytest.mark.parametrize("first", [0, 3])
def test_large_rise_after_one_of_the_first_steps_is_told_with_both_levels(first):
    rng = np.random.default_rng(0)
    loss = np.r_[np.full(first + 1, 2.0), np.full(200, 16.0)] + 0.1 * rng.normal(size=first + 201)

    effect = effect_of(loss, first, first)

    assert effect.kind == "up"
    assert (effect.before, effect.after) == pytest.approx((2, 16), abs=0.3)


def test_event_before_the_first_loss_or_after_the_last_is_not_judged():
    assert effect_of(np.r_[np.full(5, np.nan), np.ones(40)], 3, 3).kind == "unknown"
    assert effect_of(np.ones(40), 39, 39).kind == "unknown"


def test_last_rise_is_that_of_the_end_over_the_lowest_level():
    falling = np.linspace(2, 1, 300)

    assert last_rise(falling) is None
    lowest, at, final = last_rise(np.r_[falling, np.full(200, 1.5)])
    assert lowest == pytest.approx(1.03, abs=0.02)
    assert 280 <= at <= 300
    assert final == 1.5
