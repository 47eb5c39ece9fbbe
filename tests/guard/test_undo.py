"""A step is undone and scaled wherever the optimizer keeps parameters and state."""

import copy
import math
from functools import partial

import pytest
import torch
from helpers.compare import assert_bitwise_equal
from helpers.optimizers import (
    SAM,
    WRITES,
    Composite,
    Flattened,
    Hookless,
    Lookahead,
    Quantized,
    QuantizedMomentum,
    ScheduleFree,
    ScheduleFreeWrapper,
    Sealed,
    Summing,
    Velocity,
    Written,
)
from torch import nn, optim
from torch.nn.functional import cross_entropy

from safestep import SafeStep

KINDS = {
    **{f"writes {way}": partial(Written, write=write) for way, write in WRITES.items()},
    "sam": SAM,
    "sam of adam": partial(SAM, base=optim.Adam),
    "lookahead of adamw": lambda params, lr: Lookahead(optim.AdamW(params, lr=lr)),
    "lookahead of sam's base": lambda params, lr: Lookahead(optim.SGD(params, lr, momentum=0.9)),
    "lookahead of lookahead": lambda params, lr: Lookahead(Lookahead(optim.Adam(params, lr)), k=2),
    "composite": Composite,
    "hookless": lambda params, lr: Hookless(optim.AdamW(params, lr=lr)),
    "schedule-free": ScheduleFree,
    "schedule-free wrapper": lambda params, lr: ScheduleFreeWrapper(optim.SGD(params, lr=lr)),
    "velocity": Velocity,
    "sums": Summing,
    "quantized": QuantizedMomentum,
    "quantized, flattened": partial(QuantizedMomentum, kind=Flattened),
}


@pytest.fixture
def step(make_batch):
    """Return a function that makes one training step; some optimizers need a closure."""

    def make(optimizer, model, seed, spoil=1.0):
        inputs, targets = make_batch("multilayer", seed=seed)

        def closure():
            loss = cross_entropy(model(inputs), targets) * spoil
            loss.backward()
            return loss

        optimizer.zero_grad()
        closure()
        optimizer.step(closure) if isinstance(optimizer, SAM) else optimizer.step()
        return inputs

    return make


def numbers_of(model, optimizer):
    """Return all numbers of a model and of an optimizer, as plain copies."""

    def plain(value):
        if isinstance(value, Quantized):
            return value.codes.clone(), value.scale.clone()
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return [plain(value[key]) for key in sorted(value, key=str)]
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        if hasattr(value, "param_groups"):
            names = ("state", "param_groups", "base", "base_optimizer", "slow", "count", "parts")
            return [plain(getattr(value, name, None)) for name in names]
        return value if isinstance(value, (int, float)) else None

    return [plain(list(model.parameters())), plain(optimizer)]


@pytest.mark.parametrize("name", KINDS)
def test_a_step_over_the_limit_is_scaled_to_it(name, make_model, dense_normalized_step, step):
    model = make_model("multilayer")
    optimizer = KINDS[name](model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)
    for seed in range(5):
        step(optimizer, model, seed)
    assert guard.last.status == "ok"
    for group in optimizer.param_groups:
        group["lr"] *= 1e5
    before = copy.deepcopy(model)

    inputs = step(optimizer, model, 5)

    assert guard.last.status == "clipped"
    proposed, norm = guard.last.normalized_step, guard.last.step_norm
    ends, starts = (
        torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (model, before)
    )
    assert dense_normalized_step(before, model, inputs) == pytest.approx(1.0, rel=2e-4)
    assert float((ends - starts).norm()) == pytest.approx(norm / proposed, rel=2e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(100.0)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_is_not_finite_is_undone(name, is_first, make_model, step):
    model = make_model("multilayer")
    optimizer = KINDS[name](model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)
    for seed in range(0 if is_first else 4):
        step(optimizer, model, seed)
    before = numbers_of(model, optimizer)

    step(optimizer, model, 5, spoil=math.nan)

    assert guard.last.status == "skipped"
    assert_bitwise_equal(numbers_of(model, optimizer), before)
    for seed in range(6, 9):
        step(optimizer, model, seed)
        assert guard.last.status == "ok"


@pytest.mark.parametrize("name", KINDS)
def test_training_is_bitwise_the_same(name, make_model, step):
    numbers = []
    for is_guarded in (False, True):
        model = make_model("multilayer")
        optimizer = KINDS[name](model.parameters(), lr=1e-3)
        if is_guarded:
            guard = SafeStep(optimizer, model)
        for seed in range(12):
            step(optimizer, model, seed)
        numbers.append(numbers_of(model, optimizer))

    assert guard.last.status == "ok"
    assert_bitwise_equal(*numbers)


def test_the_memory_of_a_rebound_parameter_is_the_one_it_had(make_model, step):
    model = make_model("multilayer")
    optimizer = Written(model.parameters(), 1e-3, WRITES["data"])
    SafeStep(optimizer, model)
    addresses = [param.data_ptr() for param in model.parameters()]

    step(optimizer, model, 0, spoil=math.nan)

    assert [param.data_ptr() for param in model.parameters()] == addresses


@pytest.mark.parametrize("name", ["velocity", "schedule-free"])
def test_a_state_that_holds_the_step_is_scaled_with_it(name, make_model, step):
    model = make_model("multilayer")
    optimizer = KINDS[name](model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)
    for seed in range(4):
        step(optimizer, model, seed)
    key = {"velocity": "velocity", "schedule-free": "z"}[name]
    before = [optimizer.state[param][key].clone() for param in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 1e4

    step(optimizer, model, 4)

    scale = guard.last.scale
    assert scale < 1e-3
    for param, old in zip(model.parameters(), before, strict=True):
        moved = optimizer.state[param][key] - old
        # Of the gradient, 1e4 * scale arrived; the rest (0.1 of the old velocity) is small.
        expected = -1e4 * scale * param.grad
        assert (moved - expected).norm() <= 0.01 * expected.norm() + 0.2 * old.norm() * scale
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    statuses = []
    for seed in range(5, 9):
        step(optimizer, model, seed)
        statuses.append(guard.last.status)
    if name == "schedule-free":
        assert statuses == ["ok"] * 4


def test_a_step_proportional_to_the_learning_rate_is_made_again_with_a_smaller_one(
    make_model, step
):
    """The state is then just what that learning rate makes of it, gradients included."""
    model = make_model("multilayer")
    optimizer = Summing(model.parameters(), lr=1e-3)
    guard = SafeStep(optimizer, model)
    for seed in range(3):
        step(optimizer, model, seed)
    twin = copy.deepcopy(model)
    other = Summing(twin.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 100.0
    step(optimizer, model, 3)
    other.param_groups[0]["lr"] = 100.0 * guard.last.scale

    step(other, twin, 3)

    assert guard.last.status == "clipped"
    other.param_groups[0]["lr"] = 100.0
    torch.testing.assert_close(numbers_of(model, optimizer), numbers_of(twin, other))


def test_a_moving_average_of_gradients_is_that_of_the_whole_step(make_model, step):
    averages = []
    for is_guarded in (False, True):
        model = make_model("multilayer")
        optimizer = type("Mine", (optim.AdamW,), {})(model.parameters(), lr=1e3)
        guard = SafeStep(optimizer, model) if is_guarded else None
        step(optimizer, model, 0)
        averages.append([dict(state) for state in optimizer.state.values()])

    assert guard.last.status == "clipped"
    assert_bitwise_equal(*averages)


def test_step_hooks_see_a_step_once(make_model, step):
    model, seen = make_model("multilayer"), []
    optimizer = ScheduleFree(model.parameters(), lr=100.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    guard = SafeStep(optimizer, model)
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    step(optimizer, model, 0)

    assert guard.last.status == "clipped"
    assert seen == ["before", "after"]


def test_a_state_that_cannot_be_copied_is_said_and_the_rest_is_undone(make_model, step):
    model = make_model("multilayer")
    optimizer = QuantizedMomentum(model.parameters(), lr=1e-3, kind=Sealed)
    guard = SafeStep(optimizer, model)
    step(optimizer, model, 0)
    before = copy.deepcopy(list(model.parameters()))

    with pytest.warns(UserWarning, match=r"cannot be copied \(Sealed\).*leaves them as the step"):
        step(optimizer, model, 1, spoil=math.nan)

    assert guard.last.status == "skipped"
    assert_bitwise_equal(list(model.parameters()), before)


def test_a_state_in_objects_and_containers_of_any_kind_is_put_back():
    class Moments:
        def __init__(self):
            self.first, self.count = torch.zeros(2), 0

    class Nested(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "rates": [torch.ones(1)]})
            self.history, self.total = [], torch.zeros(2)

        @torch.no_grad()
        def step(self, closure=None):
            (param,) = self.param_groups[0]["params"]
            moments = self.state[param].setdefault("moments", Moments())
            moments.first += param.grad
            moments.count += 1
            self.history.append(moments.first.clone())
            self.total += 1
            self.extra = True
            self.param_groups[0]["rates"][0] += 1
            param -= 0.1 * moments.first

    model = nn.Linear(2, 2, bias=False)
    optimizer = Nested([model.weight])
    model.weight.grad = torch.ones(2, 2)
    optimizer.state[model.weight]["moments"] = Moments()
    optimizer.state[model.weight]["moments"].first = torch.zeros(2, 2)
    guard = SafeStep(optimizer, model)
    cross_entropy(model(torch.full((1, 2), math.nan)), torch.tensor([0])).backward()

    optimizer.step()

    moments = optimizer.state[model.weight]["moments"]
    assert guard.last.status == "skipped"
    assert (moments.count, optimizer.history, hasattr(optimizer, "extra")) == (0, [], False)
    assert not moments.first.any()
    assert not optimizer.total.any()
    assert optimizer.param_groups[0]["rates"][0] == 1
