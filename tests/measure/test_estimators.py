"""Logit tangents against dense Jacobians in float64, and what a measurement leaves behind."""

import copy
import random
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from safestep import SafeStep, logit_spread, logits_jvp
from safestep.measure.estimator_registry import ESTIMATOR_OPTIONS, Estimator, EstimatorOption
from safestep.measure.estimators import MissingTangentError, tangents_in_place
from safestep.measure.perturb import moved_back

MODELS = ["linear", "multilayer", "residual", "attention", "recurrent", "cached"]


def random_tangent(model, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)
        for name, param in model.named_parameters()
    }


def largest_spread(tangent):
    return logit_spread(tangent).max().item()


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_jvp_equals_a_dense_float64_jacobian(
    name, dtype, tolerance, is_training, make_model, make_batch, dense_logit_tangent
):
    model = make_model(name).to(dtype).train(is_training)
    inputs, _ = make_batch(name)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    tangent = random_tangent(model)

    logits, logit_tangent = logits_jvp(model, tangent, inputs)

    expected = dense_logit_tangent(model, tangent, inputs)
    assert largest_spread(logit_tangent) == pytest.approx(largest_spread(expected), rel=tolerance)
    torch.testing.assert_close(
        logit_tangent.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item()
    )
    # Not bitwise: another attention kernel may have to do.
    torch.testing.assert_close(logits, copy.deepcopy(model)(inputs).detach())


def test_logits_jvp_draws_the_dropout_mask_of_a_forward_pass_at_the_same_seed(
    make_model, make_batch, dense_logit_tangent
):
    model, (inputs, _) = make_model("dropout").double(), make_batch("dropout")
    tangent = random_tangent(model)

    torch.manual_seed(5)
    expected = dense_logit_tangent(model, tangent, inputs)
    torch.manual_seed(5)
    _, logit_tangent = logits_jvp(model, tangent, inputs.double())

    torch.testing.assert_close(logit_tangent, expected, rtol=1e-9, atol=1e-12)


def test_logits_jvp_moves_only_the_named_parameters(make_model, make_batch):
    model, (inputs, _) = make_model("multilayer").double(), make_batch("multilayer")
    tangent = {"4.bias": torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)}

    _, logit_tangent = logits_jvp(model, tangent, inputs.double())

    torch.testing.assert_close(logit_tangent, tangent["4.bias"].expand(len(inputs), 3))


def test_logits_jvp_accepts_a_tied_parameter_under_either_name(
    make_model, make_batch, dense_logit_tangent
):
    model, (tokens, _) = make_model("attention").double(), make_batch("attention")
    tangent = random_tangent(model)
    renamed = {"head.weight": tangent["embedding.weight"]}
    expected = dense_logit_tangent(model, {"embedding.weight": renamed["head.weight"]}, tokens)

    for names in (("head.weight",), ("embedding.weight",), ("embedding.weight", "head.weight")):
        _, logit_tangent = logits_jvp(model, dict.fromkeys(names, renamed["head.weight"]), tokens)
        torch.testing.assert_close(logit_tangent, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dropout", "residual", "attention-dropout"])
def test_logits_jvp_leaves_no_trace(name, make_model, make_batch):
    model, (inputs, targets) = make_model(name), make_batch(name)
    logits = model(inputs)
    nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    values, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    modes = [module.training for module in model.modules()]
    random_states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()

    logits_jvp(model, random_tangent(model), inputs)

    after = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(one is other for one, other in zip(tensors, after, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(values, after, strict=True))
    assert versions == [t._version for t in after]
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random_states[0], torch.get_rng_state())
    assert random_states[1] == repr(np.random.get_state())
    assert random_states[2] == random.getstate()


def test_logits_jvp_lets_a_pending_backward_pass_run_afterwards(make_model, make_batch):
    model, (inputs, _) = make_model("residual"), make_batch("residual")
    total = model(inputs).logsumexp(-1).sum()
    expected = torch.autograd.grad(total, [*model.parameters()], retain_graph=True)

    logits_jvp(model, random_tangent(model), inputs)

    actual = torch.autograd.grad(total, [*model.parameters()])
    assert all(map(torch.equal, actual, expected))


def test_logits_jvp_follows_the_users_way_to_the_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2, bias=False)

        def forward(self, inputs, *, temperature):
            return {"scores": self.head(inputs), "temperature": temperature}

    model, tangent = Wrapped(), {"head.weight": torch.tensor([[1.0, 0.0], [0.0, -1.0]])}

    _, logit_tangent = logits_jvp(
        model, tangent, torch.tensor([[3.0, 5.0]]), temperature=2.0,
        logits=lambda output: output["scores"] / output["temperature"],
    )  # fmt: skip

    assert logit_tangent.tolist() == [[1.5, -2.5]]


@pytest.mark.parametrize(
    ("tangent", "message"),
    [
        ({"offset": torch.zeros(2)}, "keys of `tangent` to be parameter names, got 'offset'"),
        ({"bias": torch.zeros(3)}, r"`tangent\['bias'\]` of shape \(2,\), got \(3,\)"),
    ],
    ids=["name", "shape"],
)
def test_logits_jvp_refuses_a_tangent_that_does_not_fit(tangent, message):
    with pytest.raises(ValueError, match=message):
        logits_jvp(nn.Linear(2, 2), tangent, torch.ones(1, 2))


def test_logits_jvp_refuses_an_output_without_logits():
    model = nn.GRU(3, 4)

    with pytest.raises(TypeError, match=r"a tensor or an object with `.logits`, got tuple"):
        logits_jvp(model, random_tangent(model), torch.ones(2, 1, 3))


def test_logits_jvp_refuses_logits_that_no_tangent_reaches():
    class Detached(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).detach()

    model = Detached(2, 2)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(MissingTangentError, match="no tangent reaches the logits"):
        logits_jvp(model, random_tangent(model), torch.ones(1, 2))

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_logits_jvp_restores_everything_when_the_model_raises(make_model, make_batch):
    model, (inputs, _) = make_model("residual"), make_batch("residual")
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.head.register_forward_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError, match="division by zero"):
        logits_jvp(model, random_tangent(model), inputs)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not torch.autograd.forward_ad.unpack_dual(model.head.weight).tangent


def test_moved_back_exchanges_the_bits_and_keeps_version_counters():
    param = nn.Parameter(torch.tensor([1.0, float("nan"), -0.0]))
    start = torch.tensor([2.0, 3.0, float("inf")])
    bits = param.detach().clone().view(torch.int32), start.clone().view(torch.int32)
    version = param._version

    with moved_back([param], [start]):
        assert torch.equal(param.detach().view(torch.int32), bits[1])
        assert torch.equal(start.view(torch.int32), bits[0])

    assert torch.equal(param.detach().view(torch.int32), bits[0])
    assert torch.equal(start.view(torch.int32), bits[1])
    assert param._version == version


def test_tangents_in_place_gives_a_parameter_its_tangent_only_inside():
    param, tangent = nn.Parameter(torch.ones(2)), torch.tensor([3.0, 4.0])

    with torch.no_grad(), tangents_in_place([param], [tangent]):
        inside = torch.autograd.forward_ad.unpack_dual(param * 2).tangent
        assert inside is not None
        assert inside.tolist() == [6.0, 8.0]

    assert torch.equal(param, torch.ones(2))
    assert param.requires_grad


@pytest.mark.parametrize("copies", [True, False], ids=["update made", "update to come"])
@pytest.mark.parametrize("name", ["linear", "multilayer"])
@pytest.mark.parametrize("estimator", [each for each in Estimator if each.is_option])
def test_every_estimator_is_within_its_stated_error_of_a_dense_jacobian(
    estimator, name, copies, make_model, make_batch, train_step, dense_normalized_step
):
    model, batch = make_model(name), make_batch(name)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard = SafeStep(
        optimizer, model, estimator=estimator.value, action="monitor", copy=copies
    )  # fmt: skip

    train_step(optimizer, model, batch)

    expected = dense_normalized_step(before, model, batch[0])
    assert guard.last.estimator == estimator.value
    assert guard.last.normalized_step == pytest.approx(expected, rel=estimator.error)


def test_type_checkers_know_the_estimators_that_may_be_chosen():
    assert get_args(EstimatorOption) == ESTIMATOR_OPTIONS
