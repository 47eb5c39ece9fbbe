"""While the guard does not intervene, training is bitwise what it would have been without it."""

import random

import numpy as np
import pytest
import torch
from helpers.compare import assert_bitwise_equal
from torch.nn.functional import cross_entropy

from safestep import SafeStep


def train(model, batches, optimizer, *, guard_options=None, accumulate=1):
    """Return every number that training left behind, and the guard's reports."""
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    guard = None if guard_options is None else SafeStep(optimizer, model, **guard_options)
    losses, reports = [], []
    for index, (inputs, targets) in enumerate(batches):
        loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        losses.append(loss.detach())
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            reports.append(guard and guard.last)
    numbers = {
        "losses": losses,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": [torch.get_rng_state(), torch.from_numpy(np.random.rand(3)), random.random()],
    }
    return numbers, reports


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


@pytest.mark.parametrize("name", ["dropout", "residual", "attention-dropout"])
def test_training_is_bitwise_the_same_over_200_steps(name, make_model, make_batch):
    guarded, plain = make_model(name), make_model(name)
    batches = [make_batch(name, seed=seed) for seed in range(200)]

    actual, reports = train(guarded, batches, adamw(guarded), guard_options={})
    expected, _ = train(plain, batches, adamw(plain))

    assert {report.status for report in reports} == {"ok"}
    assert all(0 < report.normalized_step <= 1 for report in reports)
    assert_bitwise_equal(actual, expected, equal_nan=True)


@pytest.mark.parametrize(
    "guard_options",
    [{"radius": "certified"}, {"quantile": 0.5}, {"estimator": "auto"}, {"action": "monitor"}],
    ids=str,
)
def test_no_option_changes_training_while_nothing_is_clipped(guard_options, make_model, make_batch):
    guarded, plain = make_model("residual"), make_model("residual")
    batches = [make_batch("residual", seed=seed) for seed in range(30)]

    actual, reports = train(guarded, batches, adamw(guarded), guard_options=guard_options)
    expected, _ = train(plain, batches, adamw(plain))

    assert {report.status for report in reports} == {"ok"}
    assert_bitwise_equal(actual, expected, equal_nan=True)


def test_monitor_changes_nothing_however_long_or_broken_the_steps_are(make_model, make_batch):
    guarded, plain = make_model("dropout"), make_model("dropout")
    batches = [make_batch("dropout", seed=seed) for seed in range(20)]
    batches[15][0].fill_(float("nan"))

    with pytest.warns(UserWarning, match="left alone: the gradient is not finite"):
        actual, reports = train(
            guarded, batches, adamw(guarded, lr=10.0), guard_options={"action": "monitor"}
        )
    expected, _ = train(plain, batches, adamw(plain, lr=10.0))

    assert all(report.normalized_step > 1 for report in reports[:15])
    assert {report.scale for report in reports} == {1.0}
    assert reports[15].reason.startswith("the gradient is not finite: 0.weight")
    assert_bitwise_equal(actual, expected, equal_nan=True)


def test_accumulated_micro_batches_change_nothing(make_model, make_batch):
    guarded, plain = make_model("attention-dropout"), make_model("attention-dropout")
    batches = [make_batch("attention-dropout", seed=seed) for seed in range(60)]

    actual, reports = train(guarded, batches, adamw(guarded), guard_options={}, accumulate=3)
    expected, _ = train(plain, batches, adamw(plain), accumulate=3)

    assert {report.status for report in reports} == {"ok"}
    assert_bitwise_equal(actual, expected, equal_nan=True)


def test_a_step_that_cannot_be_measured_is_left_alone(make_model, make_batch):
    guarded, plain = make_model("residual"), make_model("residual")
    batches = [make_batch("residual", seed=seed) for seed in range(5)]

    def refuse(_):
        raise ValueError("no logits today")

    with pytest.warns(UserWarning, match="left alone: ValueError: no logits today"):
        actual, reports = train(guarded, batches, adamw(guarded), guard_options={"logits": refuse})
    expected, _ = train(plain, batches, adamw(plain))

    assert {report.status for report in reports} == {"unmeasured"}
    assert_bitwise_equal(actual, expected, equal_nan=True)
