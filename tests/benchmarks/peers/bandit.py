"""A loss as GRPO has it, on rewards whose best policy is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from .task import Loss, Task


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


def contexts(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    contexts = torch.arange(16)
    if generator is not None:
        contexts = torch.randint(16, (32,), generator=generator)
    return one_hot(contexts, 16).float(), contexts


def policy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)
    )
