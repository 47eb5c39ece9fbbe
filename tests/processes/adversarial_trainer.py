"""StepSafety on a GAN on the ranks of a Trainer: ``adversarial_trainer.py OUTPUT``.

Each rank writes, for every optimizer step of a scenario: which optimizer, the parameters before and
after, the inputs and the report.
"""

import copy
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  once before the fork, not in every rank
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from safestep.callbacks import StepSafety

FAKE, REAL = 0, 1


class Adversarial(LightningModule):
    """A generator and a discriminator that take turns within a batch, as Lightning shows it."""

    def __init__(self, lr, safety):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.lr, self.safety, self.steps = lr, safety, []

    def on_train_start(self):
        torch.manual_seed(100 + self.global_rank)  # noise

    def generator_loss(self, noise):
        logits = self.discriminator(self.generator(noise))
        return cross_entropy(logits, torch.full((len(noise),), REAL))

    def discriminator_loss(self, pair):
        is_real = torch.arange(len(pair)) < len(pair) // 2
        return cross_entropy(self.discriminator(pair), is_real.long())

    def training_step(self, real, batch_idx):
        noise = torch.randn(len(real), 2)
        if self.safety:
            self.safety.record(0, self.generator_loss, noise)
        self.step(0, self.generator_loss, noise)
        pair = torch.cat([real, self.generator(torch.randn(len(real), 2)).detach()])
        self.step(1, self.discriminator_loss, pair)

    def step(self, index, loss, inputs):
        optimizer = self.optimizers()[index]
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss(inputs))
        before = copy.deepcopy(self.state_dict())
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        report = asdict(self.safety.guards[index].last) if self.safety else None
        self.steps.append((index, before, copy.deepcopy(self.state_dict()), inputs, report))

    def configure_optimizers(self):
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=self.lr) for part in parts]

    def on_train_end(self):
        torch.save(self.steps, f"{self.trainer.default_root_dir}/rank{self.global_rank}.pt")


def fit(path, lr, action):
    seed_everything(0, verbose=False)
    path.mkdir()
    safety = StepSafety(action=action) if action else None
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="fork", find_unused_parameters=True),
        max_epochs=1,
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[safety] if safety else [],
    ).fit(Adversarial(lr, safety), DataLoader(torch.randn(64, 8), 8, shuffle=True))


def main(output):
    torch.set_num_threads(1)
    fit(output / "watched", 0.01, "monitor")
    fit(output / "unguarded", 0.01, None)
    fit(output / "clipped", 3.0, "clip")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
