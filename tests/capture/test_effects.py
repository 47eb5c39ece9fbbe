"""A forward pass that changes state: the re-run starts where it started, and leaves nothing.

Every kind of state trains bitwise as without a guard, and r is that of float64 differences of the
model as it was before the call.
"""

import copy
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from safestep import SafeStep

WIDTH = 6


def zeros():
    return torch.zeros(WIDTH, dtype=torch.float64)


def summary(hidden):
    return 0.3 * hidden.detach().mean(0)


@dataclass
class Memory:
    """An object of the user's own."""

    state: torch.Tensor = field(default_factory=zeros)
    log: list = field(default_factory=list)


class Slots:
    """An object without a dict."""

    __slots__ = ("state",)

    def __init__(self):
        self.state = zeros()


class Mapping(dict):
    """A container of the user's own."""


class Net(nn.Module):
    """A classifier whose hidden layer passes through `use`, with a state that `make` makes."""

    def __init__(self, make, use, *, is_argument=False):
        super().__init__()
        self.body, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.use = use
        self.double()
        if not is_argument:
            self.state = make()

    def forward(self, inputs, state=None):
        hidden = torch.tanh(self.body(inputs))
        return 3 * self.head(self.use(self, hidden, state))


def rebind(net, hidden, _):
    hidden, net.state = hidden + net.state, summary(hidden + net.state)
    return hidden


def in_place(net, hidden, _):
    hidden = hidden + net.state
    net.state.mul_(0.5).add_(summary(hidden))
    return hidden


def by_data(net, hidden, _):
    hidden = hidden + net.state
    net.state.data.mul_(0.5).add_(summary(hidden))
    return hidden


def append(net, hidden, _):
    hidden = hidden + sum(list(net.state)[-3:], zeros())
    net.state.append(summary(hidden))
    return hidden


def at_key(net, hidden, _):
    hidden = hidden + net.state.get("state", zeros())
    net.state["state"] = summary(hidden)
    return hidden


def of_object(net, hidden, _):
    hidden = hidden + net.state.state
    net.state.state = summary(hidden)
    return hidden


def within_object(net, hidden, _):
    hidden = hidden + net.state[0].state
    net.state[0].state.mul_(0.5).add_(summary(hidden))
    net.state[0].log.append(len(hidden))
    return hidden


def count(net, hidden, _):
    net.state += 1
    return hidden * (1 + net.state % 3)


def of_numpy(net, hidden, _):
    hidden = hidden + torch.from_numpy(net.state.copy())
    net.state *= 0.5
    net.state += summary(hidden).numpy()
    return hidden


def route(net, hidden, _):
    gate = torch.softmax(hidden + net.state, -1)
    with torch.no_grad():
        net.state.add_(torch.sign(gate.mean() - gate.mean(0)), alpha=0.1)
    return hidden * gate * WIDTH


def lazily(net, hidden, _):
    if not hasattr(net, "cache"):
        net.cache = zeros()
    hidden, net.cache = hidden + net.cache, summary(hidden + net.cache)
    return hidden


def buffer():
    return nn.Buffer(zeros())


STATES = {
    "attribute": (zeros, rebind),
    "attribute, in place": (zeros, in_place),
    "attribute, through .data": (zeros, by_data),
    "buffer": (buffer, in_place),
    "buffer, through .data": (buffer, by_data),
    "buffer, bound anew": (buffer, rebind),
    "list": (list, append),
    "queue": (lambda: deque(maxlen=3), append),
    "dict": (dict, at_key),
    "dict subclass": (Mapping, at_key),
    "dataclass": (Memory, of_object),
    "slots": (Slots, of_object),
    "objects in a list": (lambda: [Memory()], within_object),
    "counter": (int, count),
    "array": (lambda: np.zeros(WIDTH), of_numpy),
    "router bias": (lambda: nn.Parameter(zeros(), requires_grad=False), route),
    "made in the first call": (int, lazily),
}


def argument_in_place(net, hidden, state):
    hidden = hidden + state
    state.mul_(0.5).add_(summary(hidden))
    return hidden


def argument_item(net, hidden, state):
    hidden = hidden + state["state"]
    state["state"] = summary(hidden)
    return hidden


def argument_object(net, hidden, state):
    hidden = hidden + state.state
    state.state = summary(hidden)
    state.log.append(len(hidden))
    return hidden


def argument_kept(net, hidden, state):
    net.memory = state
    return argument_object(net, hidden, net.memory)


def argument_list(net, hidden, state):
    hidden = hidden + sum(state[-3:], zeros())
    state.append(summary(hidden))
    return hidden


def argument_array(net, hidden, state):
    hidden = hidden + torch.from_numpy(state.copy())
    state *= 0.5
    state += summary(hidden).numpy()
    return hidden


ARGUMENTS = {
    "tensor": (zeros, argument_in_place),
    "list": (list, argument_list),
    "dict": (lambda: {"state": zeros()}, argument_item),
    "dict subclass": (lambda: Mapping(state=zeros()), argument_item),
    "object": (Memory, argument_object),
    "object that the module keeps": (Memory, argument_kept),
    "array": (lambda: np.zeros(WIDTH), argument_array),
}


class Momentum(nn.Module):
    """A classifier with a second encoder that follows the first, as `move` has it."""

    def __init__(self, move):
        super().__init__()
        self.body, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.slow = copy.deepcopy(self.body).requires_grad_(False)
        self.move = move
        self.double()

    def forward(self, inputs):
        self.move(list(self.slow.parameters()), list(self.body.parameters()))
        return 3 * self.head(torch.tanh(self.body(inputs)) * torch.tanh(self.slow(inputs)))


@torch.no_grad()
def by_add(slow, fast):
    for one, other in zip(slow, fast, strict=True):
        one.mul_(0.9).add_(other, alpha=0.1)


@torch.no_grad()
def by_copy(slow, fast):
    for one, other in zip(slow, fast, strict=True):
        one.copy_(0.9 * one + 0.1 * other)


@torch.no_grad()
def by_lerp(slow, fast):
    torch._foreach_lerp_(slow, fast, 0.1)


def by_binding(slow, fast):
    for one, other in zip(slow, fast, strict=True):
        one.data = 0.9 * one.data + 0.1 * other.data


def by_data_in_place(slow, fast):
    for one, other in zip(slow, fast, strict=True):
        one.data.mul_(0.9).add_(other.data, alpha=0.1)


# Whether the tangent of the first encoder reaches the second one.
MOVES = {by_add: True, by_copy: True, by_lerp: True, by_binding: False, by_data_in_place: False}


class Prototypes(nn.Module):
    """A classifier that normalizes its own weight, as `normalize` has it."""

    def __init__(self, normalize):
        super().__init__()
        self.body, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3, bias=False)
        self.normalize = normalize
        self.double()

    def forward(self, inputs):
        self.normalize(self.head.weight)
        return self.head(functional.normalize(self.body(inputs), dim=1)) / 0.1


def unit(weight):
    return functional.normalize(weight, dim=1)


def bind(weight):
    weight.data = unit(weight.data)


def copy_unit(weight):
    with torch.no_grad():
        weight.copy_(unit(weight))


def divide(weight):
    with torch.no_grad():
        weight.div_(weight.norm(dim=1, keepdim=True))


def divide_assigned(weight):
    with torch.no_grad():
        weight /= weight.norm(dim=1, keepdim=True)


def divide_data(weight):
    weight.data.div_(weight.data.norm(dim=1, keepdim=True))


def divide_each(weight):
    with torch.no_grad():
        torch._foreach_div_([weight], [weight.norm(dim=1, keepdim=True)])


def set_items(weight):
    with torch.no_grad():
        weight[:] = unit(weight)


def clamp(weight):
    with torch.no_grad():
        weight.clamp_(-0.2, 0.2)


WRITES = (
    bind, copy_unit, divide, divide_assigned, divide_data, divide_each, set_items, clamp,
)  # fmt: skip


def leave(weight):
    """Normalize nothing: what the forward pass wrote is there already."""


def train(make, arguments=(), *, is_guarded=True, how="loop", accumulated=1, steps=6, **options):
    """Return the model, its arguments, and for every step the report and the true r."""
    torch.manual_seed(0)
    model, arguments = make(), copy.deepcopy(arguments)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    options = {"estimator": "jvp", "action": "monitor", **options}
    guard = SafeStep(optimizer, model, **options) if is_guarded else None

    def loss_of(inputs, labels, *arguments):
        return functional.cross_entropy(model(inputs, *arguments), labels)

    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        calls = []
        for _ in range(accumulated):
            inputs, labels = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
            calls.append(copy.deepcopy((model, (inputs, *arguments))))
            if guard and how == "record":
                guard.record(loss_of, inputs, labels, *arguments)
            loss_of(inputs, labels, *arguments).backward()
        start = [param.detach().clone() for param in trained]
        optimizer.step()
        if guard:
            end = [param.detach().clone() for param in trained]
            found.append((guard.last, max(true_r(*call, start, end) for call in calls)))
    return model, arguments, found


@torch.no_grad()
def true_r(model, arguments, start, end):
    """Return r by central differences from a copy of the model that was made before the call."""

    def logits_at(share):
        other, again = copy.deepcopy((model, arguments))
        trained = [param for param in other.parameters() if param.requires_grad]
        for param, before, after in zip(trained, start, end, strict=True):
            param.copy_(before + share * (after - before))
        if isinstance(other, Prototypes):
            other.normalize = leave
        return other(*again)

    tangent = (logits_at(1e-4) - logits_at(-1e-4)) / 2e-4
    return float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi


def plain(value):
    """Return everything in a model or an argument as numbers that can be compared."""
    if isinstance(value, nn.Module):
        own = {name: it for name, it in vars(value).items() if name in ("state", "cache", "memory")}
        return plain([value.state_dict(), own])
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [plain(item) for item in value]
    if isinstance(value, Slots):
        return plain(value.state)
    return plain(vars(value)) if isinstance(value, Memory) else value


def assert_measured_and_harmless(make, arguments=(), *, is_exact=True, **options):
    model, left, _ = train(make, arguments, is_guarded=False, **options)
    watched, left_watched, found = train(make, arguments, **options)

    assert plain(watched) == plain(model)
    assert plain(left_watched) == plain(left)
    assert {report.status for report, _ in found} == {"ok"}
    if is_exact:
        for report, true in found:
            assert report.normalized_step == pytest.approx(true, rel=1e-5)


_OTHERS = [{"accumulated": 3}, {"how": "record"}]
HOW = pytest.mark.parametrize(
    "options", [{}, *(pytest.param(other, marks=pytest.mark.slow) for other in _OTHERS)], ids=str
)


@HOW
@pytest.mark.parametrize("kind", STATES)
def test_state_of_the_module_is_that_before_the_call(kind, options):
    make, use = STATES[kind]
    assert_measured_and_harmless(lambda: Net(make, use), **options)


@HOW
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_an_argument_is_that_before_the_call(kind, options):
    make, use = ARGUMENTS[kind]
    assert_measured_and_harmless(lambda: Net(make, use, is_argument=True), (make(),), **options)


@pytest.mark.filterwarnings("ignore:SafeStep.*two estimators of one step differ:UserWarning")
@HOW
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_a_momentum_encoder_moves_once(move, options):
    assert_measured_and_harmless(lambda: Momentum(move), is_exact=MOVES[move], **options)


@HOW
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_weight_that_the_forward_pass_writes_into_moves_by_the_whole_update(write, options):
    assert_measured_and_harmless(lambda: Prototypes(write), **options)


FEW = pytest.mark.parametrize(
    "make",
    [lambda: Net(zeros, rebind), lambda: Momentum(by_add), lambda: Prototypes(copy_unit)],
    ids=["state", "momentum", "weight"],
)


@FEW
@pytest.mark.parametrize("options", _OTHERS, ids=str)
def test_each_of_several_calls_and_a_call_that_was_told_start_there(make, options):
    assert_measured_and_harmless(make, **options)


@FEW
@pytest.mark.parametrize("estimator", ["auto", "difference"])
def test_other_estimators_start_there_too(make, estimator):
    assert_measured_and_harmless(make, estimator=estimator, is_exact=estimator == "difference")


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_step_is_clipped_to_the_limit_where_the_forward_pass_writes_into_the_weight(write):
    torch.manual_seed(0)
    model = Prototypes(write)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    guard = SafeStep(optimizer, model, estimator="jvp")
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 2.0 if step == 5 else 2e-3
        inputs, labels = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        start = [param.detach().clone() for param in model.parameters()]
        optimizer.step()

    assert guard.last.status == "clipped"
    end = [param.detach() for param in model.parameters()]
    assert true_r(model, (inputs,), start, end) == pytest.approx(1.0, rel=1e-4)


def test_large_state_is_unmeasured_once_with_its_name_and_then_kept():
    def queue():
        return nn.Buffer(torch.randn(WIDTH, 20000, dtype=torch.float64))

    def push(net, hidden, _):
        hidden = hidden + 0.1 * net.state[:, :8].sum(1)
        net.state[:, : len(hidden)] = hidden.detach().T
        return hidden

    model, _, _ = train(lambda: Net(queue, push), is_guarded=False)
    with pytest.warns(UserWarning, match="state was changed in place by the forward pass") as told:
        watched, _, found = train(lambda: Net(queue, push))

    assert plain(watched) == plain(model)
    assert [report.status for report, _ in found] == ["unmeasured"] + ["ok"] * 5
    assert len(told) == 1
    for report, true in found[1:]:
        assert report.normalized_step == pytest.approx(true, rel=1e-5)


def test_state_that_begins_to_change_is_unmeasured_once_and_then_kept():
    def late(net, hidden, _):
        hidden = hidden + net.state
        if started:
            net.state = summary(hidden)
        return hidden

    started, statuses = [], []
    model = Net(zeros, late)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp", action="monitor")

    def step():
        optimizer.zero_grad()
        inputs = torch.randn(4, 5, dtype=torch.float64)
        functional.cross_entropy(model(inputs), torch.arange(4) % 3).backward()
        optimizer.step()
        statuses.append(guard.last.status)

    for _ in range(10):
        step()
    started.append(True)
    with pytest.warns(UserWarning, match="the forward pass changes state, which it was not seen"):
        step()
    step()

    assert statuses == ["ok"] * 10 + ["unmeasured", "ok"]


def test_a_module_that_changes_nothing_is_recorded_without_a_copy():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp")
    starts = []
    record = guard._recorder.take
    guard._recorder.take = lambda: [starts.append(call.start) or call for call in record()]
    for _ in range(8):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(4, 5)), torch.arange(4) % 3).backward()
        optimizer.step()

    assert starts[0].values
    assert not starts[-1].values
    assert not starts[-1].mark.values


def test_a_trainer_that_a_module_knows_is_not_copied():
    class Trainer:
        def __init__(self, model):
            self.model, self.logged = model, []

    def log(net, hidden, _):
        net.trainer.logged.append(id(net.trainer))
        return hidden

    model = Net(int, log)
    trainer = model.trainer = Trainer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model)
    functional.cross_entropy(
        model(torch.randn(4, 5, dtype=torch.float64)), torch.arange(4) % 3
    ).backward()
    optimizer.step()

    assert guard.last.status == "ok"
    assert set(trainer.logged) == {id(trainer)}
