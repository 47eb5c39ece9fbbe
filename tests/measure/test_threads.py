"""Two threads that train models of their own, each with its guard, at the same time."""

import threading

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep

NUM_STEPS = 20


def train(seed, barrier=None):
    """Return the reports and the final parameters; the threads begin each step together."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 128), nn.LayerNorm(128), nn.Tanh(), nn.Linear(128, 10))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp")
    reports = []
    for _ in range(NUM_STEPS):
        if barrier is not None:
            barrier.wait()
        optimizer.zero_grad()
        inputs = torch.randn(64, 32, generator=generator)
        cross_entropy(model(inputs), torch.arange(64) % 10).backward()
        optimizer.step()
        last = guard.last
        reports.append((last.status, last.estimator, last.normalized_step, last.scale))
    return reports, [param.detach().clone() for param in model.parameters()]


def test_two_threads_that_measure_at_once_find_what_each_finds_alone():
    alone = [train(seed) for seed in range(2)]
    together, barrier = (
        {},
        threading.Barrier(2, timeout=60),
    )  # a thread that failed leaves none waiting
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: train(seed, barrier)}))
        for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for seed, (reports, params) in enumerate(alone):
        assert "clipped" in {status for status, *_ in reports}
        assert together[seed][0] == reports
        assert all(map(torch.equal, together[seed][1], params))
