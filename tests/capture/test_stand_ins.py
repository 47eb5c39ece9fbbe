"""Forward calls at other parameters than the step starts from, and gradients inside a call."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from safestep import SafeStep, logits_jvp

INPUTS, TARGETS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def with_other_parameters(model):
    others = {name: 0.5 * param for name, param in model.named_parameters()}
    return functional_call(model, others, (INPUTS,))


def clone(module):
    """Copy a module as meta-learning libraries do: tables of its own, but the same hooks."""
    twin = module.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {name: 0.5 * param for name, param in module._parameters.items()}
    twin._modules = {name: clone(child) for name, child in module._modules.items()}
    return twin


def with_a_clone(model):
    return clone(model)(INPUTS)


@pytest.mark.parametrize("call", [with_other_parameters, with_a_clone])
def test_a_call_on_other_parameters_is_not_measured_as_one_on_the_models_own(call):
    model = network()
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model)

    cross_entropy(call(model), TARGETS).backward()
    with pytest.warns(UserWarning, match=r"guard\.record"):
        guard.optimizer.step()

    assert guard.last.status == "unmeasured"
    assert "other parameters than the model's own" in guard.last.reason
    cross_entropy(model(INPUTS), TARGETS).backward()
    guard.optimizer.step()
    assert guard.last.status == "ok"


@pytest.mark.parametrize("estimator", ["jvp", "difference", "secant"])
def test_a_model_that_computes_a_gradient_itself_is_measured(estimator):
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.head = network(), nn.Linear(5, 3)

        def forward(self, inputs):
            inputs = inputs.detach().requires_grad_()
            score = self.score(inputs).sum()
            return self.head(torch.autograd.grad(score, inputs, create_graph=True)[0])

    model = Slope()
    before = copy.deepcopy(model).double()
    guard = SafeStep(torch.optim.SGD(model.parameters(), 0.1), model, estimator=estimator)
    cross_entropy(model(INPUTS), TARGETS).backward()
    guard.optimizer.step()

    share, params = 1e-6, list(before.parameters())
    starts = [param.detach().clone() for param in params]
    ends = []
    for sign in (1, -1):
        for param, start, end in zip(params, starts, model.parameters(), strict=True):
            param.data = start + sign * share * (end.detach().double() - start)
        ends.append(before(INPUTS.double()).detach())
    tangent = (ends[0] - ends[1]) / (2 * share)
    expected = float((tangent.amax(-1) - tangent.amin(-1)).max()) / torch.pi
    tolerance = 0.1 if estimator == "secant" else 2e-3  # a secant ends where the step does
    assert guard.last.estimator == estimator
    assert guard.last.normalized_step == pytest.approx(expected, rel=tolerance)


class Ahead(torch.optim.SGD):
    """Evaluates its closure where the momentum leads, as schedule-free's closure variants do."""

    @torch.no_grad()
    def step(self, closure):
        places = [param.clone() for group in self.param_groups for param in group["params"]]
        for param in self.param_groups[0]["params"]:
            param.mul_(0.9)
        with torch.enable_grad():
            loss = closure()
        for param, place in zip(self.param_groups[0]["params"], places, strict=True):
            param.copy_(place - self.param_groups[0]["lr"] * param.grad)
        return loss


def test_an_optimizer_that_moves_before_its_closure_is_measured_and_clipped():
    model = network()
    before = copy.deepcopy(model)
    optimizer = Ahead(model.parameters(), lr=1e3)
    guard = SafeStep(optimizer, model)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(INPUTS), TARGETS)
        loss.backward()
        return loss

    optimizer.step(closure)

    update = {
        n: p.detach() - dict(before.named_parameters())[n] for n, p in model.named_parameters()
    }
    _, tangent = logits_jvp(before, update, INPUTS)
    assert guard.last.status == "clipped"
    assert float((tangent.amax(-1) - tangent.amin(-1)).max()) / torch.pi == pytest.approx(
        1, rel=1e-3
    )
