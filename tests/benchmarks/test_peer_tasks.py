"""The tasks of the peers: what is known about them holds."""

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # they run as scripts
    return importlib.import_module("peer_tasks")


class Fixed(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, inputs):
        return inputs @ self.logits


def test_the_best_policy_of_the_bandit_is_the_softmax_of_its_rewards(tasks):
    task = tasks.TASKS["GRPO bandit"]
    best = Fixed(task.rewards() / task.penalty)

    short, accuracy = task.evaluate(best)

    assert short == pytest.approx(0, abs=1e-6)
    assert accuracy == 1
    for scale in (0.5, 2.0):
        assert task.evaluate(Fixed(scale * task.rewards() / task.penalty))[0] > 1e-3


def test_the_gradient_of_the_bandit_vanishes_on_average_at_the_best_policy(tasks):
    task, generator = tasks.TASKS["GRPO bandit"], torch.Generator().manual_seed(0)
    for logits, most in ((task.rewards() / task.penalty, 0.002), (torch.zeros(16, 8), None)):
        policy = Fixed(logits.clone())
        inputs, contexts = task.batch(None)
        inputs, contexts = inputs.repeat(2000, 1), contexts.repeat(2000)
        found = policy(inputs)
        task.loss(found, contexts, generator)(found).backward()
        norm = float(policy.logits.grad.norm())
        assert norm < most if most else norm > 0.01


def test_byte_pairs_spell_the_text_in_fewer_tokens(tasks):
    pairs, text = tasks._pairs(132), tasks._text()

    assert len(pairs) < len(text)
    assert set(pairs.tolist()) <= set(range(132))
    assert int((pairs == 131).sum()) > 50
