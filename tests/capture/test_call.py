"""A recorded call runs again as it ran."""

import pytest
import torch
from helpers.models import mlp
from torch import nn

from safestep.capture.isolation import without_side_effects
from safestep.capture.recorder import Recorder


def test_a_re_run_takes_place_in_the_mode_and_autocast_region_of_its_call():
    model, inputs = mlp(dropout=0.5), torch.randn(16, 5)
    recorder = Recorder(model, lambda: list(model.parameters()))
    logits = model(inputs)
    logits.sum().backward()
    model.eval()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (call,) = recorder.take()
        with without_side_effects(model):
            again = call.run()

    assert torch.equal(logits, again)
    assert not model.training


def test_a_small_input_changed_in_place_before_the_step_is_kept_as_it_was():
    model, inputs = mlp(), torch.randn(8, 5)
    recorder = Recorder(model, lambda: list(model.parameters()))
    logits = model(inputs)
    logits.sum().backward()
    inputs.zero_()

    assert torch.equal(recorder.take()[0].run(), logits)
    assert not inputs.any()


def test_a_large_input_changed_in_place_before_the_step_is_noticed_once_and_then_kept():
    model, inputs = nn.Linear(2, 3), torch.randn(40000, 2)
    recorder = Recorder(model, lambda: list(model.parameters()))
    model(inputs).sum().backward()
    inputs.zero_()
    with pytest.raises(RuntimeError, match="argument 1 of the model"):
        recorder.take()[0].run()

    logits = model(inputs.normal_())
    logits.sum().backward()
    inputs.zero_()
    assert torch.equal(recorder.take()[0].run(), logits)
