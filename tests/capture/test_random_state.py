"""Random state and train/eval modes: recorded in full, until calls have shown what they need."""

import random

import numpy as np
import pytest
import torch
from helpers.models import mlp
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.capture.isolation import without_side_effects
from safestep.capture.recorder import Recorder


class Changing(nn.Module):
    """Does something else in training, once it is told to."""

    def __init__(self, change, *, has_changed):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.change, self.has_changed = change, has_changed

    def forward(self, inputs):
        return self.linear(self.change(self, inputs) if self.has_changed else inputs)


def draw(model, inputs):
    return inputs + random.random() + np.random.random()


def drop(model, inputs):
    model.dropout = getattr(model, "dropout", None) or nn.Dropout(0.5)
    return model.dropout(inputs)


def own_draw(model, inputs):
    model.generator = getattr(model, "generator", None) or torch.Generator().manual_seed(1)
    return inputs + torch.randn(5, generator=model.generator)


def estimators_of(model, first_changed, steps):
    """Train, let the model change at some step, and return the estimator of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp")
    estimators = []
    for step in range(steps):
        model.has_changed = step >= first_changed
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(8, 5)), torch.arange(8) % 3).backward()
        optimizer.step()
        estimators.append(guard.last.estimator)
    return estimators


@pytest.mark.parametrize("change", [draw, drop, own_draw])
def test_a_model_that_begins_to_draw_is_told_of_once_and_then_recorded_in_full(change):
    with pytest.warns(UserWarning, match="r is that of another draw") as warned:
        estimators = estimators_of(Changing(change, has_changed=False), 18, steps=22)

    assert estimators.pop(18) == "jvp (of another random draw)"
    assert set(estimators) == {"jvp"}
    assert len(warned) == 1


def test_dropout_that_a_model_is_put_into_train_mode_for_is_recorded():
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).eval()
    recorder = Recorder(model, lambda: list(model.parameters()))
    for step in range(40):
        model.train(20 <= step < 30)
        logits = model(torch.randn(8, 5))
        logits.sum().backward()
        (call,) = recorder.take()
        with torch.no_grad(), without_side_effects(model):
            assert torch.equal(logits, call.run())

        assert not call.lacks


@pytest.mark.parametrize("change", [draw, drop, own_draw])
def test_what_a_model_always_depended_on_is_recorded_at_every_step(change):
    model = Changing(change, has_changed=True)
    inputs = torch.randn(8, 5)
    recorder = Recorder(model, lambda: list(model.parameters()))
    for step in range(40):
        logits = model(inputs)
        logits.sum().backward()
        (call,) = recorder.take()
        with torch.no_grad(), without_side_effects(model):
            again = call.run()

        assert torch.equal(logits, again) or step == 0  # when it is there for the first time
        assert not call.lacks


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_quiet_model_is_recorded_without_a_look_at_it(dropout):
    model = mlp(dropout)
    recorder = Recorder(model, lambda: list(model.parameters()))
    is_looked_at, is_torch_recorded = [], []
    for _ in range(20):
        logits = model(torch.randn(8, 5))
        logits.sum().backward()
        (call,) = recorder.take()
        with torch.no_grad(), without_side_effects(model):
            assert torch.equal(logits, call.run())
        is_looked_at.append(call.random.python is not None)
        is_torch_recorded.append(call.random.cpu is not None)

    assert is_looked_at == [True] * 16 + [False] * 4
    assert is_torch_recorded == [True] * 16 + [dropout > 0] * 4
