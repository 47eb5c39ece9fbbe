"""What bench_peers.py trains: a model, its data and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and a learning rate that suits AdamW on it.

    Attributes:
        lr: The learning rate.
        model: Makes the model.
        batch: Draws inputs and targets; those that are evaluated where the generator is None.
        needs: Packages that pip has and the project does not ask for.
        ranks: Number of DDP ranks; what goes wrong with data goes wrong on the last one.
    """

    lr: float
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator | None], tuple[Tensor, Tensor]]
    needs: tuple[str, ...] = ()
    ranks: int = 1

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
