"""Small models, their batches, run directories of real training, and a reference for r."""

import copy
import math
import os

import pytest
import torch
from torch import nn
from tqdm import tqdm

from safestep import SafeStep, worker_dispersion
from safestep.runlog.writer import RunLog

# Two tests run at once; what they start runs on one thread too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Its thread would outlive the test: what a model draws could then be another thread's draw.
tqdm.monitor_interval = 0


def pytest_collectstart():
    """Draw what test modules build on import from a fixed seed, whatever was imported before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    """Draw what a test builds from a fixed seed, whichever tests ran before it."""
    torch.manual_seed(0)


class Residual(nn.Module):
    """Convolutions with BatchNorm around a shortcut, classes from pooled features."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        features = self.stem(images)
        return self.head((features + self.body(features)).mean((2, 3)))


class Attention(nn.Module):
    """One pre-norm Transformer block on the default attention, and a tied output embedding."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.position = nn.Parameter(torch.zeros(5, 8))
        self.block = nn.TransformerEncoderLayer(
            8, 2, 16, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens) + self.position))


class Recurrent(nn.Module):
    """A GRU over a sequence, classes from its last output."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, sequences):
        return self.head(self.gru(sequences)[0][:, -1])


class Cached(nn.Module):
    """Keeps its parameter in a list too, and computes with the listed one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3))
        self.cache = [self.weight]

    def forward(self, inputs):
        return torch.tanh(inputs) @ self.cache[0]


def _multilayer(dropout=0.0):
    return nn.Sequential(
        nn.Linear(5, 12), nn.LayerNorm(12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3)
    )


_MODELS = {
    "linear": (lambda: nn.Linear(5, 3), (5,), 3),
    "multilayer": (_multilayer, (5,), 3),
    "dropout": (lambda: _multilayer(0.3), (5,), 3),
    "residual": (Residual, (1, 6, 6), 3),
    "attention": (Attention, None, 7),
    "attention-dropout": (lambda: Attention(0.2), None, 7),
    "recurrent": (Recurrent, (4, 3), 4),
    "cached": (Cached, (5,), 3),
}


@pytest.fixture
def make_model():
    """Return a function from a model's name to the model, its weights drawn from a fixed seed."""

    def make(name):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _MODELS[name][0]()
            for param in model.parameters():
                nn.init.normal_(param, std=0.5)
        return model

    return make


@pytest.fixture
def make_batch():
    """Return a function from a model's name to inputs and target classes."""

    def make(name, *, size=6, seed=0):
        _, shape, num_classes = _MODELS[name]
        generator = torch.Generator().manual_seed(seed)
        if shape is None:
            tokens = torch.randint(num_classes, (size, 6), generator=generator)
            return tokens[:, :-1], tokens[:, 1:]
        inputs = torch.randn(size, *shape, generator=generator)
        return inputs, torch.randint(num_classes, (size,), generator=generator)

    return make


@pytest.fixture
def model(make_model):
    return make_model("multilayer")


@pytest.fixture
def batch(make_batch):
    return make_batch("multilayer")


@pytest.fixture
def train_step():
    """Return a function that makes one training step, as each optimizer wants it."""

    def step(optimizer, model, batch):
        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            return optimizer.step(closure)
        loss = closure()
        optimizer.step()
        return loss

    return step


def _dense_logit_tangent(model, tangent, *inputs):
    """Return J @ tangent in float64: J by one reverse pass for every logit."""
    model = copy.deepcopy(model).double().requires_grad_()
    params = dict(model.named_parameters())
    tangent = {name: value.detach().double() for name, value in tangent.items()}
    logits = model(*(x.double() if x.is_floating_point() else x for x in inputs))
    rows = [
        torch.autograd.grad(
            value, [params[name] for name in tangent], retain_graph=True, materialize_grads=True
        )
        for value in logits.flatten()
    ]
    step = torch.cat([value.flatten() for value in tangent.values()])
    dense = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return (dense @ step).reshape(logits.shape)


@pytest.fixture
def dense_logit_tangent():
    """Return the reference for a logit tangent."""
    return _dense_logit_tangent


@pytest.fixture
def dense_normalized_step():
    """Return the reference for r: largest spread of J @ (after - before) over pi, in float64."""

    def measure(before, after, *batches):
        moved = {
            name: param.detach().double() - start.detach().double()
            for (name, param), start in zip(
                after.named_parameters(), before.parameters(), strict=True
            )
        }
        tangents = [_dense_logit_tangent(before, moved, inputs) for inputs in batches]
        return max(float((t.amax(-1) - t.amin(-1)).max()) for t in tangents) / math.pi

    return measure


@pytest.fixture
def secant_normalized_step():
    """Return what a secant should find: r from how far a quarter of the step moves the logits."""

    @torch.no_grad()
    def measure(before, after, *batches):
        start, end = (copy.deepcopy(model).double() for model in (before, after))
        for param, origin in zip(end.parameters(), start.parameters(), strict=True):
            param.copy_(origin + (param - origin) / 4)
        moves = [end(inputs.double()) - start(inputs.double()) for inputs in batches]
        return 4 * max(float((m.amax(-1) - m.amin(-1)).max()) for m in moves) / math.pi

    return measure


NUM_STEPS, SPIKE_STEP, DRIFT_STEP = 120, 60, 80


def _blobs(size, generator):
    """Return points around three centres, and their classes."""
    targets = torch.randint(3, (size,), generator=generator)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[targets] + torch.randn(size, 2, generator=generator), targets


def _model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))


def _train(run_dir, *, spike=1, rate=0.01, broken_step=None, **options):
    """Train with Adam, the learning rate multiplied by `spike` at one step.

    The inputs are NaN at the step that is broken.
    """
    generator, model = torch.Generator().manual_seed(0), _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with SafeStep(optimizer, model, run_dir=run_dir, **options) as guard:
        for step in range(NUM_STEPS):
            inputs, targets = _blobs(64, generator)
            inputs = inputs if step != broken_step else inputs * math.nan
            optimizer.param_groups[0]["lr"] = rate * (spike if step == SPIKE_STEP else 1)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            guard.log(loss=loss)
            optimizer.step()
    return run_dir


@pytest.fixture(scope="session")
def healthy_run(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="session")
def spiked_run(tmp_path_factory):
    """A spike of 10,000 that the guard caught."""
    return _train(tmp_path_factory.mktemp("spiked"), spike=10_000)


@pytest.fixture(scope="session")
def lost_run(tmp_path_factory):
    """The same spike, only watched."""
    return _train(tmp_path_factory.mktemp("lost"), spike=10_000, action="monitor")


@pytest.fixture(scope="session")
def hot_run(tmp_path_factory):
    """A learning rate that the guard has to lower at every step."""
    return _train(tmp_path_factory.mktemp("hot"), rate=3.0)


@pytest.fixture(scope="session")
def cold_run(tmp_path_factory):
    """A learning rate that hardly moves the logits."""
    return _train(tmp_path_factory.mktemp("cold"), rate=1e-6)


@pytest.fixture(scope="session")
def broken_run(tmp_path_factory):
    """A batch of NaN, which the guard leaves out."""
    return _train(tmp_path_factory.mktemp("broken"), broken_step=70)


@pytest.fixture(scope="session")
def worker_run(tmp_path_factory):
    """Four workers; from DRIFT_STEP on, worker 3 has shuffled labels."""
    run_dir = tmp_path_factory.mktemp("workers")
    generator, model = torch.Generator().manual_seed(0), _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params = list(model.parameters())
    with RunLog(run_dir, {"every": 1}, world_size=4) as log:
        for step in range(NUM_STEPS):
            losses, gradients = [], []
            for worker in range(4):
                inputs, targets = _blobs(64, generator)
                if worker == 3 and step >= DRIFT_STEP:
                    targets = targets[torch.randperm(64, generator=generator)]
                losses.append(nn.functional.cross_entropy(model(inputs), targets))
                gradients.append(torch.autograd.grad(losses[-1], params))
            flat = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in gradients])
            found = worker_dispersion([loss.item() for loss in losses], flat, num_examples=64)
            log.write("workers", {
                "step": step, "loss": torch.stack(losses).detach(), "grad_norm": flat.norm(dim=1),
                **{name: getattr(found, name) for name in found.__slots__},
            })  # fmt: skip
            if step == DRIFT_STEP + 9:
                found = "rank 3: loss 9 times the usual spread above the others"
                message = f"{found} since step {DRIFT_STEP}"
                log.write("event", {
                    "name": "worker", "step": step, "rank": 3, "quantity": "loss",
                    "since": DRIFT_STEP, "message": message,
                })  # fmt: skip
            for param, grads in zip(params, zip(*gradients, strict=True), strict=True):
                param.grad = torch.stack(grads).mean(0)
            optimizer.step()
    return run_dir
