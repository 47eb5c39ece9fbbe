"""WorkerConsistency on two ranks of a Trainer: ``lightning_ranks.py OUTPUT``.

Measures every step in OUTPUT/every1, every third in OUTPUT/every3.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  once before the fork, not in every rank
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from safestep.callbacks import WorkerConsistency

ACCUMULATED = 2


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.losses, self.gradients = [], []

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        loss = functional.cross_entropy(self.net(inputs), classes)
        again = functional.cross_entropy(self.net(inputs), classes)
        gradient = torch.autograd.grad(again, list(self.net.parameters()))
        self.losses.append(loss.item())
        self.gradients.append(torch.cat([grad.flatten() for grad in gradient]).numpy())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Save(Callback):
    """Keeps the reports, and writes what this rank saw."""

    def __init__(self, consistency, output):
        self.consistency, self.output, self.reports = consistency, output, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.consistency.last not in [None, *self.reports]:
            self.reports.append(self.consistency.last)

    def on_train_end(self, trainer, pl_module):
        gradients = np.array(pl_module.gradients)
        found = {
            "micro": np.reshape(pl_module.losses, (-1, ACCUMULATED)),
            "losses": np.reshape(pl_module.losses, (-1, ACCUMULATED)).mean(1),
            "gradients": gradients.reshape(-1, ACCUMULATED, gradients.shape[-1]).mean(1),
            "reports": self.reports,
            "logged": {name: float(value) for name, value in trainer.logged_metrics.items()},
        }
        torch.save(found, f"{self.output}/rank{trainer.global_rank}.pt")


def fit(output, every):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 8, generator=generator)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 8, shuffle=True)
    output.mkdir()
    consistency = WorkerConsistency(every=every, run_dir=output)
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=2,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=1e-3,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[consistency, Save(consistency, output)],
    ).fit(Classifier(), loader)


def main(output):
    torch.set_num_threads(1)
    for every in (1, 3):
        fit(output / f"every{every}", every)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
