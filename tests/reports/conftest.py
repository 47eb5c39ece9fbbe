"""Run directories that real training leaves behind."""

import pytest
import torch
from torch import nn

from safestep import SafeStep, worker_dispersion
from safestep.runlog.writer import RunLog

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


def _train(run_dir, *, spike, **options):
    """Train with Adam, the learning rate multiplied by `spike` at one step."""
    generator, model = torch.Generator().manual_seed(0), _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with SafeStep(optimizer, model, run_dir=run_dir, **options) as guard:
        for step in range(NUM_STEPS):
            inputs, targets = _blobs(64, generator)
            optimizer.param_groups[0]["lr"] = 0.01 * (spike if step == SPIKE_STEP else 1)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            guard.log(loss=loss)
            optimizer.step()
    return run_dir


@pytest.fixture(scope="session")
def healthy_run(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("healthy"), spike=1)


@pytest.fixture(scope="session")
def spiked_run(tmp_path_factory):
    """A spike of 10,000 that the guard caught."""
    return _train(tmp_path_factory.mktemp("spiked"), spike=10_000)


@pytest.fixture(scope="session")
def lost_run(tmp_path_factory):
    """The same spike, only watched."""
    return _train(tmp_path_factory.mktemp("lost"), spike=10_000, action="monitor")


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
                message = f"rank 3: loss 9 MADs above the others since step {DRIFT_STEP}"
                log.write("event", {
                    "name": "worker", "step": step, "rank": 3, "quantity": "loss",
                    "since": DRIFT_STEP, "message": message,
                })  # fmt: skip
            for param, grads in zip(params, zip(*gradients, strict=True), strict=True):
                param.grad = torch.stack(grads).mean(0)
            optimizer.step()
    return run_dir
