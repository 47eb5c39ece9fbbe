"""A gradient that is computed once more leaves no trace in the training."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from safestep import SafeStep


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


def dense_r(model, starts, inputs):
    """Return r from the Jacobian of the logits in float64."""
    model = copy.deepcopy(model)  # without the guard's hooks
    named = dict(model.named_parameters())
    before = {name: start.double() for name, start in zip(named, starts, strict=True)}
    jacobian = jacrev(lambda params: functional_call(model, params, (inputs.double(),)))(before)
    tangent = sum(
        jacobian[name].flatten(2) @ (param.detach().double() - before[name]).flatten()
        for name, param in named.items()
    )
    return float((tangent.amax(1) - tangent.amin(1)).max()) / math.pi


@pytest.mark.parametrize("optimizers", [1, 2])
def test_r_is_of_this_batch_alone_though_the_gradient_was_computed_once_more(optimizers):
    """A learned loss weight lies outside the model; gradients are cleared after the forward."""
    model, weight = network(), nn.Parameter(torch.zeros(()))
    groups = [[*model.parameters(), weight], [weight]][:optimizers]
    all_of_them = [torch.optim.Adam(group, lr=1e-3) for group in groups]
    guard, *_ = [SafeStep(each, model, estimator="jvp") for each in all_of_them]
    found, expected = [], []
    for seed in range(4):
        inputs, targets = batch(seed)
        loss = cross_entropy(model(inputs), targets) * (-weight).exp() + weight
        for optimizer in all_of_them:
            optimizer.zero_grad()
        loss.backward()
        starts = [param.detach().clone() for param in model.parameters()]
        all_of_them[0].step()
        found.append(guard.last.normalized_step)
        expected.append(dense_r(model, starts, inputs))

    assert found == pytest.approx(expected, rel=1e-5)


HOOKS = {
    "parameter": lambda model, change: model[0].weight.register_hook(change),
    "module": lambda model, change: model[1].register_full_backward_hook(
        lambda module, before, after: (change(before[0]),)
    ),
    "module, before": lambda model, change: model[2].register_full_backward_pre_hook(
        lambda module, after: (change(after[0]),)
    ),
}


@pytest.mark.parametrize("estimator", ["auto", "jvp"])
@pytest.mark.parametrize("add", HOOKS.values(), ids=HOOKS)
def test_a_hook_that_adds_noise_of_its_own_runs_once_in_each_step(add, estimator):
    ends = []
    for is_guarded in (False, True):
        model, noise, calls = network(), torch.Generator().manual_seed(1), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def change(gradient, noise=noise, calls=calls):
            calls.append(gradient.shape)
            return gradient + 0.1 * torch.randn(gradient.shape, generator=noise)

        if is_guarded:
            SafeStep(optimizer, model, estimator=estimator)
        add(model, change)
        for seed in range(8):
            optimizer.zero_grad()
            inputs, targets = batch(seed)
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        assert len(calls) == 8
        ends.append([param.detach().clone() for param in model.parameters()])

    torch.testing.assert_close(*ends, rtol=0, atol=0)
