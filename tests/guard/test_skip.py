"""A step that is not finite is not taken: all is as before it, and training goes on."""

import copy
import math

import pytest
import torch
from helpers.compare import assert_bitwise_equal
from torch import nn, optim
from torch.nn.functional import cross_entropy

from safestep import SafeStep

OPTIMIZERS = {
    "sgd-momentum": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: optim.Adam(params, lr=0.01),
    "adam-fused": lambda params: optim.Adam(params, lr=0.01, fused=True),
    "adafactor": lambda params: optim.Adafactor(params, lr=0.01),
    "nadam": lambda params: optim.NAdam(params, lr=0.01),
    "lbfgs": lambda params: optim.LBFGS(params, lr=0.1, max_iter=3),
}


def numbers_of(model, optimizer):
    # The running statistics of BatchNorm belong to the forward pass, not to the step.
    params = {name: param.detach() for name, param in model.named_parameters()}
    return copy.deepcopy([params, optimizer.state_dict()])


@pytest.mark.parametrize("is_first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_as_if_it_never_was(
    name, is_first, make_model, make_batch, train_step
):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = SafeStep(optimizer, model)
    for _ in range(0 if is_first else 3):
        train_step(optimizer, model, batch)
    before = numbers_of(model, optimizer)

    train_step(optimizer, model, (batch[0] / 0.0, batch[1]))

    assert guard.last.status == "skipped"
    assert guard.last.reason.startswith("the gradient is not finite: 0.weight;")
    assert guard.last.scale == guard.last.effective_learning_rate == 0.0
    assert_bitwise_equal(numbers_of(model, optimizer), before)

    train_step(optimizer, model, batch)
    assert guard.last.status in ("ok", "clipped")
    assert guard.last.reason is None


def test_training_goes_on_as_if_the_broken_batch_had_not_been_there(
    make_model, make_batch, train_step
):
    guarded, plain = make_model("multilayer"), make_model("multilayer")
    optimizers = optim.AdamW(guarded.parameters()), optim.AdamW(plain.parameters())
    SafeStep(optimizers[0], guarded)
    batches = [make_batch("multilayer", seed=seed) for seed in range(10)]
    broken = torch.full((6, 5), torch.nan), batches[0][1]

    for index, batch in enumerate(batches):
        if index in (0, 4, 5):
            train_step(optimizers[0], guarded, broken)
        train_step(optimizers[0], guarded, batch)
        train_step(optimizers[1], plain, batch)

    assert_bitwise_equal(numbers_of(guarded, optimizers[0]), numbers_of(plain, optimizers[1]))


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_an_update_that_is_not_finite_is_undone(value, make_model, make_batch, train_step):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    guard = SafeStep(optimizer, model)
    train_step(optimizer, model, batch)
    optimizer.param_groups[0]["lr"] = value
    before = numbers_of(model, optimizer)

    train_step(optimizer, model, batch)

    assert guard.last.status == "skipped"
    assert guard.last.reason.startswith("the update is not finite: 0.weight;")
    assert guard.last.effective_learning_rate == 0.0
    # assert_close takes one NaN for another only where told to.
    torch.testing.assert_close(numbers_of(model, optimizer), before, rtol=0, atol=0, equal_nan=True)


def test_a_division_by_zero_in_the_optimizer_is_undone(make_model, make_batch, train_step):
    model, (inputs, targets) = make_model("linear"), make_batch("linear")
    optimizer = optim.Adam(model.parameters(), lr=0.01, eps=0.0)
    guard = SafeStep(optimizer, model)
    inputs[:, 2] = 0.0  # that column's gradient is zero, its Adam update 0 / 0
    before = numbers_of(model, optimizer)

    train_step(optimizer, model, (inputs, targets))

    assert guard.last.status == "skipped"
    assert guard.last.reason.startswith("the update is not finite: weight;")
    assert_bitwise_equal(numbers_of(model, optimizer), before)


def test_an_update_whose_norm_overflows_is_undone(make_model, make_batch, train_step):
    model, batch = make_model("linear"), make_batch("linear")
    optimizer = optim.SGD(model.parameters(), lr=1e30)
    guard = SafeStep(optimizer, model)
    before = numbers_of(model, optimizer)

    train_step(optimizer, model, batch)

    assert guard.last.status == "skipped"
    assert guard.last.reason.startswith("the update is not finite: weight;")
    assert_bitwise_equal(numbers_of(model, optimizer), before)


def test_a_tangent_that_overflows_forbids_a_step_of_finite_gradient_and_update(train_step):
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    optimizer = optim.SGD(model.parameters(), lr=1e10, weight_decay=1.0)
    guard = SafeStep(optimizer, model, logits=lambda output: output)
    before = numbers_of(model, optimizer)

    # Logits of 1e30 are fitted: no gradient, and weight decay moves them by 1e10 times as much.
    train_step(optimizer, model, (torch.tensor([[1e30, 0.0]]), torch.tensor([0])))

    assert guard.last.status == "skipped"
    assert guard.last.reason.startswith("the logits or their tangent are not finite;")
    assert guard.last.step_norm < 1e11
    assert_bitwise_equal(numbers_of(model, optimizer), before)


def test_skips_in_a_row_end_in_an_error_that_names_the_cause(make_model, make_batch, train_step):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = optim.Adam(model.parameters())
    SafeStep(optimizer, model, max_consecutive_skips=3)
    broken = (batch[0] * torch.nan, batch[1])
    for each in (broken, broken, batch, broken, broken):
        train_step(optimizer, model, each)
    before = numbers_of(model, optimizer)

    with pytest.raises(
        RuntimeError, match="3 steps in a row were not taken; the last because the gradient is not"
    ):
        train_step(optimizer, model, broken)

    assert_bitwise_equal(numbers_of(model, optimizer), before)


def test_a_parameter_outside_the_model_is_named_as_such(make_model, make_batch):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    stray = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([stray, *model.parameters()], lr=0.1)
    guard = SafeStep(optimizer, model)
    loss = cross_entropy(model(batch[0]), batch[1]) + (stray * torch.inf).sum()
    loss.backward()

    optimizer.step()

    assert guard.last.reason.startswith(
        "the gradient is not finite: a parameter outside the model;"
    )
    assert torch.equal(stray.detach(), torch.ones(2))
