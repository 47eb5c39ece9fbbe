"""What is recorded of a call, and what is protected while it runs again."""

import warnings

import pytest
import torch
from torch import nn

from safestep import SafeStep
from safestep.replay import Recorder
from safestep.untraced import untraced


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
