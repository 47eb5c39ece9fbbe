"""What is recorded of a call, and what is protected while it runs again."""

import random
import warnings

import numpy as np
import pytest
import torch
from helpers.models import mlp
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.capture.recorder import Recorder


def test_a_script_module_is_refused_with_what_to_do():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(nn.Linear(5, 3))

    with pytest.raises(TypeError, match=r"got a ScriptModule. Put it .* torch.nn.Sequential"):
        SafeStep(torch.optim.SGD(model.parameters()), model)


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)], ids=str)
def test_a_recorded_training_step_runs_again_without_a_trace(steps):
    (plain, watched), (state, watched_state) = zip(
        *(train(steps, guarded=g) for g in (0, 1)), strict=True
    )

    assert plain == watched
    for name in state:
        assert torch.equal(state[name], watched_state[name]), name


def train(steps, *, guarded):
    """Return what the losses and all generators were, and the model's state."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    model = mlp(0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    guard = SafeStep(optimizer, model, action="monitor") if guarded else None

    def training_step(inputs):
        noisy = inputs * random.random() + np.random.random() + torch.randn_like(inputs)
        return functional.cross_entropy(model(noisy), torch.randint(3, (8,)))

    losses = []
    for _ in range(steps):
        inputs = torch.randn(8, 5)
        optimizer.zero_grad()
        if guard:
            guard.record(training_step, inputs)
        loss = training_step(inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert guard is None or guard.last.status == "ok"
    return [*losses, torch.rand(()).item(), np.random.random(), random.random()], model.state_dict()


def test_a_small_gradient_is_read_as_it_was_though_it_changes_later():
    model, inputs = nn.Linear(5, 3), torch.randn(8, 5)
    recorder = Recorder(model, lambda: list(model.parameters()))
    kept = []
    logits = model(inputs)
    logits.register_hook(kept.append)
    functional.cross_entropy(logits, torch.zeros(8, dtype=torch.int64)).backward()
    (gradient,) = kept
    expected = gradient.clone()
    gradient.zero_()

    (call,) = recorder.take()

    evidence = call.gradients["output"]
    assert evidence.class_axis == 1
    assert torch.equal(evidence.sample, expected[evidence.rows])


def test_an_update_is_recorded_without_a_look_at_its_gradient():
    """Only a re-run needs it: until then nothing waits for the device."""
    model, inputs = nn.Linear(5, 3), torch.randn(8, 5)
    recorder = Recorder(model, lambda: list(model.parameters()))
    functional.cross_entropy(model(inputs), torch.zeros(8, dtype=torch.int64)).backward()

    (call,) = recorder.take()

    assert list(call.unread) == ["output"]
    assert list(call.gradients) == ["output"]
    assert not call.unread


@pytest.mark.parametrize("is_hooked_before", [False, True])
def test_hooks_of_others_on_an_output_are_called_beside_the_recorders(is_hooked_before):
    model, seen = nn.Linear(4, 3), []
    if is_hooked_before:
        model.register_forward_hook(lambda *call: call[-1].register_hook(seen.append) and None)
    recorder = Recorder(model, lambda: list(model.parameters()), watches=True)
    output = model(torch.randn(5, 4))
    if not is_hooked_before:
        output.register_hook(lambda gradient: 2 * gradient)
        handle = output.register_hook(seen.append)
        output.register_hook(seen.append)
        handle.remove()

    output.sum().backward()

    (call,) = recorder.take()
    assert call.signals[-1].sum() == 15  # before it was doubled
    assert [float(gradient.sum()) for gradient in seen] == [15 if is_hooked_before else 30]


def test_the_largest_input_of_a_call_that_was_told_is_watched():
    recorder = Recorder(nn.Linear(4, 3), list, watches=True)
    inputs = {"x": torch.tensor([1.0, -7.0]), "y": torch.tensor([5.0]).half(), "n": torch.arange(9)}

    call = recorder.record(print, inputs, torch.empty(0), "text")

    assert [float(signal) for signal in call.signals] == [7.0]
    assert recorder.record(print, torch.arange(9), 2.0).signals == []
