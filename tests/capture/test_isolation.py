"""The re-run leaves no trace: a watched run is bitwise the run that nobody watched."""

import random
import warnings
from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from safestep import SafeStep
from safestep.capture.isolation import without_side_effects

NUM_CLASSES = 3


class Drawing(nn.Module):
    """Draws from every kind of random generator, its own among them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, NUM_CLASSES)
        self.torch_generator = torch.Generator().manual_seed(1)
        self.others = {"numpy": np.random.default_rng(2), "python": random.Random(3)}

    def forward(self, inputs):
        own = torch.rand(5, generator=self.torch_generator)
        drawn = [
            self.others["numpy"].random(), self.others["python"].random(),
            np.random.random(), random.random(),
        ]  # fmt: skip
        return self.linear(inputs * own + sum(drawn) + torch.randn_like(inputs))


class Remembering(nn.Module):
    """Keeps books in buffers, lists, dicts, arrays and plain numbers, and computes with them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, NUM_CLASSES)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(5))
        self.history, self.recent, self.notes = [], deque(maxlen=3), {"largest": [0.0]}
        self.last = torch.zeros(5)
        self.array = np.zeros(2)
        self.pair = (torch.zeros(5), [0])
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        self.count += 1
        self.mean.lerp_(inputs.detach().mean(0), 0.1)
        self.history.append(float(inputs.detach().sum()))
        self.recent.append(inputs.detach())
        self.notes["largest"][0] = max(self.notes["largest"][0], self.history[-1])
        self.last = inputs.detach()[0]
        self.array += 1
        self.pair[0].add_(1)
        self.pair[1].append(self.calls)
        return self.linear(inputs - self.mean / self.count)


class Measured(nn.Module):
    """Holds a metric of its own, updated in every forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, NUM_CLASSES)
        self.metric = torchmetrics.MeanMetric()

    def forward(self, inputs):
        logits = self.linear(inputs)
        self.metric.update(logits.detach().amax())
        return logits


class Checkpointed(nn.Module):
    """Recomputes its first half in the backward pass, dropout included."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, NUM_CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        inputs = inputs.clone().requires_grad_()
        return self.head(checkpoint(self.first, inputs, use_reentrant=self.use_reentrant))


class Sharing(nn.Module):
    """Ties, lists and keeps views of its parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 5, bias=False)
        self.again = nn.Linear(5, 5, bias=False)
        self.again.weight = self.embed.weight
        self.head = nn.Parameter(torch.randn(NUM_CLASSES, 5))
        self.listed = [self.head]
        self.view = self.head.data.t()
        self.layers = nn.ModuleList([self.embed, self.embed])

    def forward(self, inputs):
        hidden = torch.tanh(self.again(self.layers[1](inputs)))
        return hidden @ self.listed[0].t() + hidden @ self.view


class Peeking(nn.Module):
    """Looks at its own logits under inference_mode during training."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.peeked = []

    def forward(self, inputs):
        with torch.inference_mode():
            self.peeked.append(self.body(inputs).amax())
        return self.body(inputs)


class Hiding(nn.Module):
    """Keeps a teacher out of its own parameters, in a list, where it still counts batches."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.teachers = [mlp(0.3)]

    def forward(self, inputs):
        with torch.no_grad():
            shift = self.teachers[0](inputs)
        return self.body(inputs) + shift

    def state_dict(self, *args, **kwargs):
        own = super().state_dict(*args, **kwargs)
        return own | self.teachers[0].state_dict(prefix="teacher.")


def mlp(dropout=0.0):
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(8, NUM_CLASSES),
    )


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


def parametrized():
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(5, 8)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.orthogonal(nn.Linear(8, NUM_CLASSES), orthogonal_map="matrix_exp"),
    )


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(torch.jit.script(mlp(0.2)))


MODELS = {
    "dropout": lambda: mlp(0.3),
    "batch norm": mlp,
    "eval mode": lambda: mlp(0.3).eval(),
    "frozen": frozen,
    "own generators": Drawing,
    "books": Remembering,
    "torchmetrics": Measured,
    "checkpoint": lambda: Checkpointed(use_reentrant=False),
    "reentrant checkpoint": lambda: Checkpointed(use_reentrant=True),
    "shared": Sharing,
    "inference_mode": Peeking,
    "parametrized": parametrized,
    "hidden": Hiding,
    "jit.script": scripted,
    "lstm": lambda: LastOutput(nn.LSTM(5, 6, num_layers=2, dropout=0.3, batch_first=True)),
    "gru": lambda: LastOutput(nn.GRU(5, 6, batch_first=True)),
}


class LastOutput(nn.Module):
    """A recurrent layer over the batch as one sequence, classes from each output."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, NUM_CLASSES)

    def forward(self, inputs):
        return self.head(self.layer(inputs.unsqueeze(0))[0].squeeze(0))


def train(make_model, steps, *, watched, surroundings=nullcontext, wrap=None, scaler=None):
    """Return everything that a run leaves behind, and the reports if it was watched."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    called = wrap(model) if wrap else model
    guard = SafeStep(optimizer, called, action="monitor") if watched else None
    generator = torch.Generator().manual_seed(11)
    losses, reports = [], []
    for _ in range(steps):
        inputs = torch.randn(8, 5, generator=generator)
        target = torch.randint(NUM_CLASSES, (8,), generator=generator)
        optimizer.zero_grad()
        with surroundings():
            loss = functional.cross_entropy(called(inputs), target)
        (scaler.scale(loss) if scaler else loss).backward()
        with surroundings():
            scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        losses.append(loss.item())
        reports.append(guard.last if guard else None)
    random_state = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    books = [public(vars(child)) for child in model.modules()]
    return {
        "losses": losses,
        "state": model.state_dict(),
        "versions": [tensor._version for tensor in model.state_dict(keep_vars=True).values()],
        "optimizer": optimizer.state_dict()["state"],
        "random": random_state,
        "books": books,
    }, reports


def public(attributes):
    """Return attributes in a form that compares by value."""
    tables = vars(nn.Module())
    return {
        name: comparable(value)
        for name, value in attributes.items()
        if name not in tables and not isinstance(value, nn.Module)
    }


def comparable(value):
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [comparable(item) for item in value]
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return value.getstate()
    simple = (torch.Tensor, np.ndarray, int, float, str, type(None))
    return value if isinstance(value, simple) else type(value).__name__


def assert_bitwise_equal(one, two, path=""):
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_bitwise_equal(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_bitwise_equal(*pair, f"{path}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two), path
    else:
        assert one == two, path


STEPS = pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)], ids=str)


def assert_watching_changes_nothing(make_model, steps, **options):
    plain, _ = train(make_model, steps, watched=False, **options)
    watched, reports = train(make_model, steps, watched=True, **options)

    assert_bitwise_equal(plain, watched)
    assert {report.status for report in reports} == {"ok"}
    assert all(0 < report.normalized_step < 10 for report in reports)


@pytest.mark.filterwarnings("ignore:SafeStep.*forward-mode derivative:UserWarning")
@STEPS
@pytest.mark.parametrize("name", MODELS)
def test_replay_leaves_no_trace_in(name, steps):
    assert_watching_changes_nothing(MODELS[name], steps)


@STEPS
def test_replay_leaves_no_trace_under_autocast_with_a_weight_cache(steps):
    assert_watching_changes_nothing(
        lambda: mlp(0.2), steps, surroundings=lambda: torch.autocast("cpu", torch.bfloat16)
    )


@STEPS
def test_replay_leaves_no_trace_beside_a_grad_scaler(steps):
    def run(watched):
        return train(lambda: mlp(0.2), steps, watched=watched, scaler=torch.amp.GradScaler("cpu"))

    assert_bitwise_equal(run(watched=False)[0], run(watched=True)[0])


def compiled_in_place(model):
    model.compile(backend="aot_eager")
    return model


COMPILERS = {
    "aot_eager": lambda model: torch.compile(model, backend="aot_eager"),
    "inductor": torch.compile,
    "in place": compiled_in_place,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", COMPILERS)
def test_replay_leaves_no_trace_around_a_model_compiled(name):
    torch.compiler.reset()
    assert_watching_changes_nothing(MODELS["dropout"], 200, wrap=COMPILERS[name])


def test_a_model_that_raises_on_the_re_run_trains_on_unmeasured():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, NUM_CLASSES)

        def forward(self, inputs):
            if not torch.is_grad_enabled():
                raise ValueError("only ever called to train")
            return self.linear(inputs)

    plain, _ = train(Once, 5, watched=False)
    with pytest.warns(UserWarning, match="not measured and left alone: ValueError: only ever"):
        watched, reports = train(Once, 5, watched=True)

    assert_bitwise_equal(plain, watched)
    assert {report.status for report in reports} == {"unmeasured"}
    assert all("only ever called to train" in report.reason for report in reports)


def test_an_embedding_that_renormalises_itself_is_refused_by_name():
    def renormalised():
        return nn.Sequential(nn.Linear(5, 5), Lookup())

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, NUM_CLASSES, max_norm=0.5)

        def forward(self, inputs):
            return inputs[:, :NUM_CLASSES] + self.table(inputs.argmax(-1) % 4)

    plain, _ = train(renormalised, 5, watched=False)
    with pytest.warns(UserWarning, match=r"Embedding\(max_norm=0.5\) writes into its weight"):
        watched, reports = train(renormalised, 5, watched=True)

    assert_bitwise_equal(plain, watched)
    assert {report.status for report in reports} == {"unmeasured"}


class Counting(nn.Module):
    """Counts its calls in a buffer, a number and a list."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.seen = 0, []

    def forward(self, inputs):
        self.count += 1
        self.calls += 1
        self.seen.append(inputs)
        return inputs


def test_isolation_puts_everything_back_after_an_error():
    model = Counting()

    with pytest.raises(KeyError, match="stop"):
        run_and_stop(model)

    assert (model.calls, model.seen, model.training) == (0, [], True)
    assert (model.count.item(), model.count._version) == (0, 0)


def run_and_stop(model):
    with without_side_effects(model):
        model(torch.zeros(1))
        model.eval()
        raise KeyError("stop")


def test_isolation_shows_a_cached_view_of_a_parameter_where_the_parameter_is():
    model = nn.Linear(3, 2, bias=False)
    model.transposed = model.weight.data.t()
    kept = model.transposed

    with torch.no_grad(), without_side_effects(model):
        model.weight.fill_(7.0)
        seen = model.transposed.clone()

    assert torch.equal(seen, torch.full((3, 2), 7.0))
    assert model.transposed is kept
