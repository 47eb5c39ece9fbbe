"""What every training loop of the suite shares: a model, its optimizers and one step."""

import copy

import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from safestep import SafeStep


def network(width=12):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, 3),
    )  # fmt: skip


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (8,)
    return torch.randn(*shape, 5, generator=generator), torch.randint(3, shape, generator=generator)


class Loop:
    """A model, its optimizers, and one training step of a loop.

    Subclasses override `backward`, which returns the arguments of every forward call that counts.
    """

    lr = 1e-3
    tolerance = 2e-3  # of r: where a step is small against the parameters, float32 rounds it

    def __init__(self, make=optim.AdamW):
        self.model = self.build()
        self.optimizers = self.make_optimizers(make)
        self.guards = []

    def build(self):
        return network()

    def make_optimizers(self, make):
        return [make(self.model.parameters(), lr=self.lr)]

    def guard(self, **options):
        self.guards = [SafeStep(each, self.model, **options) for each in self.optimizers]

    def backward(self, seed):
        inputs, targets = draw(seed)
        cross_entropy(self.model(inputs), targets).backward()
        return [(inputs,)]

    def after_step(self):
        pass

    def logits(self, model, *args):
        """Return what enters the softmax, of a copy of the model."""
        return model(*args)

    def train(self, seed):
        """Make one step; return for each optimizer the model before and after it, and calls."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            if callable(getattr(optimizer, "train", None)):
                optimizer.train()
        calls, steps = self.backward(seed), []
        for optimizer in self.optimizers:
            before = copy.deepcopy(self.model)
            optimizer.step()
            steps.append((before, copy.deepcopy(self.model), calls))
        self.after_step()
        return steps
