"""Every optimizer's real update, clipped to the limit as a dense float64 Jacobian measures it."""

import copy
import sys

import pytest
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from safestep import SafeStep

# Learning rates at which the first step is too long for the "multilayer" model.
OPTIMIZERS = {
    "sgd": lambda params: optim.SGD(params, lr=100),
    "sgd-momentum": lambda params: optim.SGD(params, lr=100, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": lambda params: optim.SGD(params, lr=100, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda params: optim.SGD(
        params, lr=100, momentum=0.9, nesterov=True, foreach=True
    ),
    "sgd-fused": lambda params: optim.SGD(params, lr=100, fused=True),
    "adam": lambda params: optim.Adam(params, lr=10),
    "adam-foreach": lambda params: optim.Adam(params, lr=10, foreach=True),
    "adam-fused": lambda params: optim.Adam(params, lr=10, fused=True),
    "adam-amsgrad": lambda params: optim.Adam(params, lr=10, amsgrad=True),
    "adam-tensor-lr": lambda params: optim.Adam(params, lr=torch.tensor(10.0)),
    "adamw": lambda params: optim.AdamW(params, lr=10, weight_decay=0.1),
    "nadam": lambda params: optim.NAdam(params, lr=10),
    "radam": lambda params: optim.RAdam(params, lr=100),
    "rmsprop": lambda params: optim.RMSprop(params, lr=10, centered=True, momentum=0.5),
    "adagrad": lambda params: optim.Adagrad(params, lr=10),
    "adadelta": lambda params: optim.Adadelta(params, lr=1e4),
    "adamax": lambda params: optim.Adamax(params, lr=10),
    "adafactor": lambda params: optim.Adafactor(params, lr=100),
    "rprop": lambda params: optim.Rprop(params, lr=10),
    "asgd": lambda params: optim.ASGD(params, lr=100),
    "lbfgs": lambda params: optim.LBFGS(params, lr=100, max_iter=3),
    "lbfgs-strong-wolfe": lambda params: optim.LBFGS(params, lr=100, line_search_fn="strong_wolfe"),
}


def assert_sane(optimizer):
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_over_the_limit_lands_on_it(
    name, make_model, make_batch, dense_normalized_step, train_step
):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = SafeStep(optimizer, model)

    for step in range(4):
        before = copy.deepcopy(model)
        train_step(optimizer, model, batch)

        assert guard.last.step == step
        if guard.last.status == "clipped":
            applied = dense_normalized_step(before, model, batch[0])
            assert applied == pytest.approx(1.0, rel=1e-4)
        if step == 0:
            assert guard.last.status == "clipped"
    assert_sane(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_reported_r_is_that_of_the_step_the_optimizer_would_have_made(
    name, make_model, make_batch, dense_normalized_step, train_step
):
    guarded, plain, batch = (
        make_model("multilayer"), make_model("multilayer"), make_batch("multilayer"),
    )  # fmt: skip
    before = copy.deepcopy(plain)
    optimizer = OPTIMIZERS[name](guarded.parameters())
    guard = SafeStep(optimizer, guarded)

    train_step(optimizer, guarded, batch)
    train_step(OPTIMIZERS[name](plain.parameters()), plain, batch)

    expected = dense_normalized_step(before, plain, batch[0])
    assert guard.last.normalized_step == pytest.approx(expected, rel=1e-5)
    assert guard.last.scale == pytest.approx(1 / expected, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("lbfgs")])
def test_a_clip_leaves_the_optimizer_state_that_the_whole_step_would_have_left(
    name, make_model, make_batch, train_step
):
    guarded, plain, batch = (
        make_model("multilayer"), make_model("multilayer"), make_batch("multilayer"),
    )  # fmt: skip
    optimizers = OPTIMIZERS[name](guarded.parameters()), OPTIMIZERS[name](plain.parameters())
    guard = SafeStep(optimizers[0], guarded)

    for optimizer, model in zip(optimizers, (guarded, plain), strict=True):
        train_step(optimizer, model, batch)

    assert guard.last.status == "clipped"
    torch.testing.assert_close(
        optimizers[0].state_dict(), optimizers[1].state_dict(), rtol=0, atol=0
    )


def test_lbfgs_goes_on_learning_after_clips(make_model, make_batch, train_step):
    model, batch = make_model("multilayer"), make_batch("multilayer", size=64)
    optimizer = optim.LBFGS(model.parameters(), lr=1, max_iter=1)
    guard = SafeStep(optimizer, model, max_normalized_step=0.5)

    for _ in range(60):
        loss = train_step(optimizer, model, batch)
        # Curvature from moves that were cut short would let r grow to 1e19.
        assert guard.last.normalized_step < 100

    assert loss.item() < 0.6  # from 1.9; how fast depends on rounding, and so on the threads


def test_sparse_adam_is_clipped_to_the_limit(dense_normalized_step, train_step):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(0, 1), nn.Linear(4, 3))
    model[2].requires_grad_(False)
    optimizer = optim.SparseAdam(model[0].parameters(), lr=100)
    guard = SafeStep(optimizer, model)
    batch = torch.tensor([[1, 2], [2, 5]]), torch.tensor([0, 1, 2, 0])
    dense = copy.deepcopy(model)
    dense[0].sparse = False

    train_step(optimizer, model, batch)

    assert guard.last.status == "clipped"
    assert dense_normalized_step(dense, model, batch[0]) == pytest.approx(1.0, rel=1e-4)
    unused = [0, 3, 4, 6, 7, 8]
    assert torch.equal(model[0].weight[unused], dense[0].weight[unused])


def test_two_optimizers_on_one_model_sum_to_a_bound_of_the_joint_step(
    make_model, make_batch, dense_normalized_step
):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizers = optim.Muon(matrices, lr=100), optim.AdamW(vectors, lr=10)
    guards = [SafeStep(optimizer, model, max_normalized_step=0.05) for optimizer in optimizers]

    for _ in range(3):
        start = copy.deepcopy(model)
        cross_entropy(model(batch[0]), batch[1]).backward()
        for optimizer, guard in zip(optimizers, guards, strict=True):
            before = copy.deepcopy(model)
            optimizer.step()
            assert guard.last.status == "clipped"
            own = dense_normalized_step(before, model, batch[0])
            assert own == pytest.approx(0.05, rel=1e-4)
        model.zero_grad()

        # Each was measured where its optimizer found the parameters, not both at the start.
        assert dense_normalized_step(start, model, batch[0]) <= 0.1 * 1.02


@pytest.mark.parametrize("is_frozen_late", [False, True], ids=["frozen", "frozen-late"])
def test_groups_and_frozen_parameters_are_moved_as_the_optimizer_would_but_less(
    is_frozen_late, make_model, make_batch, dense_normalized_step
):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = optim.SGD([
        {"params": model[0].parameters(), "lr": 50.0},
        {"params": model[1].parameters(), "lr": 0.0},
        {"params": model[4].parameters(), "lr": 200.0},
    ])  # fmt: skip
    model[0].bias.requires_grad_(is_frozen_late)
    guard = SafeStep(optimizer, model)
    before = copy.deepcopy(model)
    cross_entropy(model(batch[0]), batch[1]).backward()
    # A gradient that is there when a parameter is frozen still moves it: torch asks no further.
    model[0].bias.requires_grad_(False)

    optimizer.step()

    assert guard.last.status == "clipped"
    assert guard.last.learning_rate == 50.0
    assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(model[0].bias, before[0].bias) != is_frozen_late
    assert torch.equal(model[1].weight, before[1].weight)
    ratio = (model[0].weight - before[0].weight) / model[0].weight.grad
    torch.testing.assert_close(
        ratio, torch.full_like(ratio, -50.0 * guard.last.scale), rtol=1e-3, atol=0
    )


def test_a_parameter_group_added_later_is_guarded(
    make_model, make_batch, dense_normalized_step, train_step
):
    model, batch = make_model("multilayer"), make_batch("multilayer")
    optimizer = optim.Adam(model[4].parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)
    train_step(optimizer, model, batch)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 100.0})
    before = copy.deepcopy(model)

    train_step(optimizer, model, batch)

    assert guard.last.status == "clipped"
    assert dense_normalized_step(before, model, batch[0]) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype_are_clipped_as_well_as_their_rounding_allows(
    dtype, make_model, make_batch, dense_normalized_step, train_step
):
    model, (inputs, targets) = make_model("multilayer").to(dtype), make_batch("multilayer")
    optimizer = optim.SGD(model.parameters(), lr=100)
    guard = SafeStep(optimizer, model)
    before = copy.deepcopy(model)

    train_step(optimizer, model, (inputs.to(dtype), targets))

    assert guard.last.status == "clipped"
    applied = dense_normalized_step(before, model, inputs.to(dtype))
    # bfloat16 keeps 8 bits of the weights and of the tangent.
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-9
    assert applied == pytest.approx(1.0, rel=tolerance)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_capturable_steps_are_guarded_as_others_are(monkeypatch, options):
    """Their counts of steps are tensors on the device. Torch keeps them off a CPU: not here."""
    module = sys.modules[optim.Adam.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(8, 5, generator=generator), torch.arange(8) % 3
    models = [nn.Linear(5, 3)]
    models.append(copy.deepcopy(models[0]))
    guarded, plain = (
        optim.AdamW(each.parameters(), lr=torch.tensor(1e-2), capturable=True, **options)
        for each in models
    )
    guard = SafeStep(guarded, models[0], estimator="jvp")

    def step(factor=1.0):
        for optimizer, model in zip((guarded, plain), models, strict=True):
            optimizer.zero_grad()
            (factor * cross_entropy(model(inputs), labels)).backward()
            optimizer.step()

    for _ in range(4):
        step()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    guarded.param_groups[0]["lr"].mul_(1e5)
    step()
    assert guard.last.status == "clipped"
    before = [param.clone() for param in models[0].parameters()]
    step(float("nan"))
    assert guard.last.status == "skipped"
    assert all(map(torch.equal, models[0].parameters(), before))
    assert {int(state["step"]) for state in guarded.state.values()} == {5}


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam])
def test_a_differentiable_step_keeps_its_graph(cls):
    """The rate's own gradient, through the step, is bitwise that without a guard."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(8, 5, generator=generator), torch.arange(8) % 3
    model, found = nn.Linear(5, 3), []
    for is_guarded in (False, True):
        rate = torch.tensor(0.1, requires_grad=True)
        starts = [param.detach().clone().requires_grad_() for param in model.parameters()]
        params = [start.clone() for start in starts]

        def loss(params=params):
            return cross_entropy(nn.functional.linear(inputs, *params), labels)

        optimizer = cls(params, lr=rate, differentiable=True)
        guard = SafeStep(optimizer, model, estimator="jvp") if is_guarded else None
        if guard is not None:
            guard.record(loss)
        for param, gradient in zip(params, torch.autograd.grad(loss(), params), strict=True):
            param.grad = gradient
        optimizer.step()
        loss().backward()
        found.append([rate.grad, *(start.grad for start in starts)])
    assert guard is not None
    assert guard.last.status == "ok"
    assert all(map(torch.equal, *found))
