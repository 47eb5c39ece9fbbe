"""A guard whose optimizer never steps says so; one whose gradients accumulate does not."""

import copy

import pytest
import torch
from helpers.optimizers import SAM
from torch import nn, optim
from torch.nn.functional import cross_entropy

from safestep import SafeStep


@pytest.fixture
def backward(model, make_batch):
    def run(seed, spoil=1.0):
        inputs, targets = make_batch("multilayer", seed=seed)
        (cross_entropy(model(inputs), targets) * spoil).backward()

    return run


def two_step_sam(model):
    optimizer = SAM(model.parameters(), lr=0.01)
    return optimizer, (optimizer.first_step, optimizer.second_step)


def created_again(model):
    other = optim.AdamW(model.parameters(), lr=0.01)
    return optim.AdamW(model.parameters(), lr=0.01), (other.step,)


def without_clearing_to_none(model):
    other = optim.SGD(model.parameters(), lr=0.01)

    def step():
        other.step()
        other.zero_grad(set_to_none=False)

    return optim.SGD(model.parameters(), lr=0.01), (step,)


def unfrozen(model):
    for param in model[0].parameters():
        param.requires_grad_(False)
    head = optim.SGD(model[4].parameters(), lr=0.01)
    model.requires_grad_(True)
    return head, (optim.SGD(model.parameters(), lr=0.01).step,)


def rebinding(model):
    def step():
        for param in model.parameters():
            param.data = param.data - 0.01 * param.grad

    return optim.SGD(model.parameters(), lr=0.01), (step,)


def of_another_model(model):
    twin = copy.deepcopy(model)
    other = optim.SGD(model.parameters(), lr=0.01)
    return optim.SGD(twin.parameters(), lr=0.01), (other.step,)


@pytest.mark.parametrize(
    "make",
    [two_step_sam, created_again, without_clearing_to_none, unfrozen, rebinding, of_another_model],
)
def test_an_optimizer_that_never_steps_is_warned_of(make, model, backward):
    optimizer, steps = make(model)
    guard = SafeStep(optimizer, model)

    def train():
        for seed in range(40):
            for step in steps:
                backward(seed)
                step()
            if make is not without_clearing_to_none:
                model.zero_grad()

    with pytest.warns(UserWarning, match=r"never stepped, yet its parameters moved") as caught:
        train()

    assert guard.last is None
    (said,) = (str(each.message) for each in caught)
    assert "SAM's first_step" in said


class Normalizing(nn.Module):
    """Moves its weight in every forward call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, inputs):
        self.weight.data = nn.functional.normalize(self.weight.data, dim=1)
        return inputs @ self.weight.T


@pytest.mark.parametrize("is_cleared", [False, True], ids=["accumulated", "only-looked-at"])
def test_many_backward_passes_without_a_step_are_legitimate(is_cleared, model, backward):
    guard = SafeStep(optim.SGD(model.parameters(), lr=1e-4), model)
    for seed in range(200):
        if is_cleared:  # gradients for an analysis, or infinite ones that a GradScaler throws away
            model.zero_grad()
        backward(seed)
    guard.optimizer.step()

    assert guard.last is not None


def test_a_forward_pass_that_moves_parameters_is_no_step(make_batch):
    model = Normalizing()
    optimizer = optim.SGD(model.parameters(), lr=1e-4)
    SafeStep(optimizer, model)
    for seed in range(64):
        inputs, targets = make_batch("linear", seed=seed)
        (cross_entropy(model(inputs), targets) / 64).backward()


def test_other_steps_in_between_are_legitimate(model, backward):
    """As of critics, or of a second optimizer on the same parameters."""
    optimizers = [optim.SGD(model.parameters(), lr=1e-4) for _ in range(2)]
    guard = SafeStep(optimizers[0], model)
    for seed in range(60):
        backward(seed)
        optimizers[seed % 10 != 0].step()
        model.zero_grad()

    assert guard.last.step == 5


def test_a_disabled_guard_does_not_wait_for_steps(model, backward):
    optimizer = optim.SGD(model.parameters(), lr=1e-4)
    guard = SafeStep(optimizer, model)
    guard.enabled = False
    for seed in range(60):
        backward(seed)
        optimizer.step()
        model.zero_grad()

    assert guard.last is None
