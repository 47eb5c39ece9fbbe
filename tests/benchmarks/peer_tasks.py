"""What bench_peers.py trains, and what goes wrong: real data, models of 1 to 5 ms a step.

The tasks of TUNED are where options were chosen; the others are what is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from bench_step import GPT, Block, Shape, _digits, _text, mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

STEPS = 120
TROUBLE = 70  # the step at which it begins
HELD_OUT = 360  # digits
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and a learning rate that suits AdamW on it.

    Attributes:
        lr: The learning rate.
        model: Makes the model.
        batch: Draws inputs and targets; those that are evaluated where the generator is None.
    """

    lr: float
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator | None], tuple[Tensor, Tensor]]

    def loss(self, logits: Tensor, targets: Tensor, generator: torch.Generator) -> Loss:
        """Return the loss as a function of logits, given those of the model that is trained."""
        return lambda logits: cross_entropy(logits.flatten(0, -2), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Return loss and accuracy on what was held out."""
        model.eval()
        inputs, targets = self.batch(None)
        logits = model(inputs).flatten(0, -2)
        accuracy = float((logits.argmax(-1) == targets).double().mean())
        model.train()
        return float(cross_entropy(logits, targets)), accuracy


class Bandit(Task):
    """GRPO without its standard deviation, on rewards whose best policy is known.

    16 contexts and 8 actions: one pays 1, another 0.5, each in half of the cases. Eight actions
    are drawn for each context. With a penalty of 0.1 times the divergence from the uniform policy,
    the best policy is a softmax of the mean rewards over 0.1; the loss that is evaluated is by how
    much the policy falls short of it.
    """

    penalty = 0.1

    @staticmethod
    def rewards() -> Tensor:
        actions = torch.arange(16)
        best, second = one_hot(actions * 3 % 8, 8), one_hot(actions * 5 % 8, 8)
        return 0.5 * torch.maximum(best.float(), 0.5 * second)

    def loss(self, logits: Tensor, targets: Tensor, generator: torch.Generator) -> Loss:
        policy = logits.detach().softmax(-1).nan_to_num(1 / 8)
        actions = torch.multinomial(policy, 8, replacement=True, generator=generator)
        given = torch.rand(actions.shape, generator=generator) < 0.5
        rewards = 2 * self.rewards()[targets].gather(-1, actions) * given
        advantages = rewards - rewards.mean(-1, keepdim=True)
        old = logits.detach().log_softmax(-1).gather(-1, actions)

        def loss(logits: Tensor) -> Tensor:
            log_policy = logits.log_softmax(-1)
            ratio = (log_policy.gather(-1, actions) - old).exp()
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            divergence = (log_policy.exp() * log_policy).sum(-1) + math.log(8)
            return self.penalty * divergence.mean() - surrogate.mean()

        return loss

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        inputs, targets = self.batch(None)
        log_policy, rewards = model(inputs).log_softmax(-1), self.rewards()[targets]
        worth = (log_policy.exp() * (rewards - self.penalty * log_policy)).sum(-1)
        best = self.penalty * torch.logsumexp(rewards / self.penalty, -1)
        chosen = rewards.gather(-1, log_policy.argmax(-1, keepdim=True))[:, 0]
        return float((best - worth).mean()), float((chosen == rewards.amax(-1)).double().mean())


class ViT(nn.Module):
    """A Transformer over the 16 patches of 2 x 2 pixels of a digit."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.view(-1, 1, 8, 8)).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def cnn() -> nn.Module:
    """Return a small network of convolutions and BatchNorm for the digits."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def _images(generator: torch.Generator | None, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    inputs, targets = _digits()
    if generator is None:
        return inputs[:HELD_OUT], targets[:HELD_OUT]
    rows = HELD_OUT + torch.randint(len(inputs) - HELD_OUT, (batch_size,), generator=generator)
    return inputs[rows], targets[rows]


@cache
def _pairs(vocabulary: int = 256) -> Tensor:
    """Return the source text of ``random`` in byte pairs, merged until there are so many codes."""
    codes = _text().tolist()
    for new in range(128, vocabulary):
        counts: dict[tuple[int, int], int] = {}
        for pair in pairwise(codes):
            counts[pair] = counts.get(pair, 0) + 1
        first, second = max(counts, key=counts.__getitem__)
        merged, index = [], 0
        while index < len(codes):
            is_pair = codes[index] == first and codes[index + 1 : index + 2] == [second]
            merged.append(new if is_pair else codes[index])
            index += 1 + is_pair
        codes = merged
    return torch.tensor(codes)


def _language(tokens: Callable[[], Tensor], held_out: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def batch(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        codes, length = tokens(), 64
        end = len(codes) - held_out
        starts = torch.arange(end, len(codes) - length - 1, length)[:, None]
        if generator is not None:
            starts = torch.randint(end - length - 1, (4, 1), generator=generator)
        window = codes[starts + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:].flatten()

    return batch


def _contexts(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    contexts = torch.arange(16)
    if generator is not None:
        contexts = torch.randint(16, (32,), generator=generator)
    return one_hot(contexts, 16).float(), contexts


def _policy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)
    )


TASKS: dict[str, Task] = {
    "digits MLP": Task(2e-3, lambda: mlp(Shape(64, 64, 3, 10)), _images),
    "character GPT": Task(5e-3, lambda: GPT(Shape(4, 32, 2, 128)), _language(_text, 4096)),
    "GRPO bandit": Bandit(5e-3, _policy, _contexts),
    "digits CNN": Task(5e-3, cnn, _images),
    "digits ViT": Task(5e-3, lambda: ViT(32, 2), partial(_images, batch_size=32)),
    "BPE GPT": Task(5e-3, lambda: GPT(Shape(4, 32, 2, 256)), _language(_pairs, 2048)),
}
TUNED = ("character GPT", "digits MLP")


@dataclass(frozen=True)
class Situation:
    """What goes wrong in a run.

    Attributes:
        rate: From the step to the factor of the learning rate.
        warm_up: Number of steps over which the learning rate rises.
        spoil: Changes inputs and targets of a step in trouble.
        logits: Changes the logits of a step in trouble.
        betas: Those of Adam.
        context: What the forward pass runs in.
    """

    rate: Callable[[int], float] = lambda step: 1.0
    warm_up: int = 20
    spoil: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda step, x, y: (x, y)
    logits: Callable[[int, Tensor], Tensor] = lambda step, logits: logits
    betas: tuple[float, float] = (0.9, 0.999)
    context: Callable[[], Any] = field(default=nullcontext)


def _once(factor: float) -> Situation:
    return Situation(lambda step: factor if step == TROUBLE else 1.0)


def _held(factor: float) -> Situation:
    return Situation(lambda step: factor if step >= TROUBLE else 1.0)


def _poisoned(step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, targets.flip(0).roll(1) if TROUBLE <= step < TROUBLE + 20 else targets


def _corrupted(step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One batch a hundred times as large, or of one token only."""
    if step == TROUBLE:
        inputs = 100 * inputs if inputs.is_floating_point() else torch.full_like(inputs, 7)
    return inputs, targets


RATES = {
    f"rate x{factor}": Situation(lambda step, factor=factor: factor)
    for factor in (0.1, 0.32, 3.2, 10.0)
}
TROUBLES = {
    "x1000 once": _once(1e3),
    "x10 held": _held(10.0),
    "x100 held": _held(100.0),
    "bursts": Situation(lambda step: 100.0 if step >= 40 and step % 30 < 3 else 1.0),
    "ramp": Situation(lambda step: 1000 ** (max(0, step - TROUBLE) / (STEPS - TROUBLE))),
    "no warm-up, x10": Situation(lambda step: 10.0, warm_up=1),
    "poisoned labels": Situation(spoil=_poisoned),
    "corrupted batch": Situation(spoil=_corrupted),
    "a batch of NaN": Situation(logits=lambda step, z: z * math.nan if step == TROUBLE else z),
    "beta2 0.9999": Situation(betas=(0.9, 0.9999)),
    "bf16": Situation(context=lambda: torch.autocast("cpu", torch.bfloat16)),
}
SITUATIONS = {"healthy": Situation(), **TROUBLES, **RATES}
