"""SafeStep on the stages of torch's pipeline, over two real gloo processes."""

import pytest
import torch
from helpers.scripts import run_script
from torch import nn

from safestep.parallel.stages import pipeline_stages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in every scenario; one start of the processes for all of them."""
    output = tmp_path_factory.mktemp("pipeline")
    run_script("pipeline_stages.py", output)
    return [torch.load(output / f"rank{rank}.pt") for rank in range(2)]


def are_equal(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("scenario", ["both", "both, of one shape"])
def test_stages_that_are_guarded_together_raise_on_every_rank_before_anything_moves(
    ranks, scenario
):
    for found in ranks:
        message = found[scenario]["error"]
        assert "same `stages of a pipeline` on every rank, got [0] on rank 0 and [1]" in message
        assert "attach a guard on the last stage only" in message
        assert are_equal(found[scenario]["start"], found[scenario]["after"])


def module_of(params):
    width = params[0].shape[1]
    module = nn.Sequential(nn.Linear(width, len(params[0])), nn.Tanh())
    nn.utils.vector_to_parameters(torch.cat([p.flatten() for p in params]), module.parameters())
    return module


def test_the_last_stage_alone_is_measured_for_its_own_parameters(ranks, dense_normalized_step):
    first, last = (found["last"] for found in ranks)

    assert [status for status, _ in last["reports"]] == ["ok"] * 4
    for (below, *_), (before, after, inputs, r) in zip(first["steps"], last["steps"], strict=True):
        hidden = module_of(below)(inputs).detach()
        expected = dense_normalized_step(module_of(before), module_of(after), hidden)
        assert r == pytest.approx(expected, rel=1e-4)  # float32


def test_an_earlier_stage_is_unmeasured_and_says_why(ranks):
    for status, reason in ranks[0]["each"]["reports"]:
        assert status == "unmeasured"
        assert "the loss holds no softmax" in reason


@pytest.mark.parametrize("scenario", ["last", "each"])
def test_stages_train_bitwise_as_without_a_guard_that_does_not_intervene(ranks, scenario):
    for found in ranks:
        assert are_equal(found[scenario]["after"], found["unguarded"]["after"])


def test_a_module_outside_a_pipeline_is_no_stage():
    assert pipeline_stages(nn.Linear(2, 2)) == ()
