"""Generators that a model does not draw from are left to the threads that do."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep


@pytest.fixture
def other_thread():
    """A thread that waits, and draws a number whenever it is told to."""
    told, drawn, is_over = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    numbers = []

    def work():
        while told.acquire() and not is_over.is_set():
            numbers.append(float(torch.rand((), dtype=torch.float64)))
            drawn.release()

    def draw():
        told.release()
        drawn.acquire()

    thread = threading.Thread(target=work)
    thread.start()
    yield draw, numbers
    is_over.set()
    told.release()
    thread.join()


class Net(nn.Module):
    """A classifier during whose re-run another thread draws."""

    def __init__(self, dropout, draw):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Linear(8, 3))
        self.draw = draw

    def forward(self, inputs):
        logits = self.layers(inputs)
        if not logits.requires_grad:
            self.draw()
        return logits


def trained(model, steps=6):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = SafeStep(optimizer, model, estimator="jvp")
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(torch.ones(4, 5)), torch.arange(4) % 3).backward()
        optimizer.step()
    return guard


def test_no_draw_of_another_thread_is_repeated_where_the_model_draws_nothing(other_thread):
    draw, numbers = other_thread

    guard = trained(Net(0.0, draw))

    assert guard.last.status == "ok"
    assert guard.last.estimator == "jvp"
    assert len(set(numbers)) == len(numbers) >= 6


def test_dropout_is_drawn_again_beside_another_thread(other_thread):
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    seen = []
    model.register_forward_hook(lambda *call: seen.append(call[-1].detach().clone()))

    trained(model, steps=1)

    first, *others = seen
    assert any(torch.equal(first, other) for other in others)


def test_generators_are_put_back_where_no_other_thread_runs():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SafeStep(optimizer, model, estimator="jvp")
    cross_entropy(model(torch.ones(4, 5)), torch.arange(4) % 3).backward()
    state = torch.get_rng_state()

    optimizer.step()

    assert torch.equal(torch.get_rng_state(), state)
