"""What is recorded of a call, and what is protected while it runs again."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.capture.isolation import untraced
from safestep.capture.recorder import Recorder


class Counting(nn.Module):
    """Counts its calls in a buffer, a number and a list."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.seen = 0, []

    def forward(self, inputs):
        self.count += 1
        self.calls += 1
        self.seen.append(inputs)
        return inputs


def mlp(dropout=0.0):
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3))


def test_a_script_module_is_refused_with_what_to_do():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(nn.Linear(5, 3))

    with pytest.raises(TypeError, match=r"got a ScriptModule. Put it .* torch.nn.Sequential"):
        SafeStep(torch.optim.SGD(model.parameters()), model)


def test_a_re_run_takes_place_in_the_mode_and_autocast_region_of_its_call():
    model, inputs = mlp(dropout=0.5), torch.randn(16, 5)
    recorder = Recorder(model, lambda: list(model.parameters()))
    logits = model(inputs)
    logits.sum().backward()
    model.eval()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (call,) = recorder.take()
        with untraced(model):
            again = call.run()

    assert torch.equal(logits, again)
    assert not model.training


def test_an_input_changed_in_place_before_the_step_is_noticed():
    model, inputs = mlp(), torch.randn(8, 5)
    recorder = Recorder(model, lambda: list(model.parameters()))
    model(inputs).sum().backward()
    inputs.zero_()

    with pytest.raises(RuntimeError, match="changed in place between its forward pass and the"):
        recorder.take()[0].run()


def test_untraced_puts_everything_back_after_an_error():
    model = Counting()

    with pytest.raises(KeyError, match="stop"):
        run_and_stop(model)

    assert (model.calls, model.seen, model.training) == (0, [], True)
    assert (model.count.item(), model.count._version) == (0, 0)


def run_and_stop(model):
    with untraced(model):
        model(torch.zeros(1))
        model.eval()
        raise KeyError("stop")


def test_untraced_shows_a_cached_view_of_a_parameter_where_the_parameter_is():
    model = nn.Linear(3, 2, bias=False)
    model.transposed = model.weight.data.t()
    kept = model.transposed

    with torch.no_grad(), untraced(model):
        model.weight.fill_(7.0)
        seen = model.transposed.clone()

    assert torch.equal(seen, torch.full((3, 2), 7.0))
    assert model.transposed is kept


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
        with torch.no_grad(), untraced(model):
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
        with torch.no_grad(), untraced(model):
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
        with torch.no_grad(), untraced(model):
            assert torch.equal(logits, call.run())
        is_looked_at.append(call.random.python is not None)
        is_torch_recorded.append(call.random.cpu is not None)

    assert is_looked_at == [True] * 16 + [False] * 4
    assert is_torch_recorded == [True] * 16 + [dropout > 0] * 4
