"""StepSafety on the ranks of a Trainer: ``guarded_trainer.py OUTPUT NUM_RANKS SCENARIO...``."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  once before the fork, not in every rank
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from safestep.callbacks import StepSafety, WorkerConsistency

SCALED_FROM = 20


class Classifier(LightningModule):
    """A classifier with BatchNorm and dropout; on rank 1, a planted fault."""

    def __init__(self, lr, is_manual=False, has_unused=False, fault=None, dropout=0.2):
        super().__init__()
        torch.manual_seed(0)
        self.lr, self.automatic_optimization = lr, not is_manual
        self.fault = fault
        Classifier.seen = set()  # of the class: a re-run undoes what it changes in the module
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)
        )
        self.unused = nn.Linear(2, 2) if has_unused else None

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        if self.fault is not None and self.global_rank == 1:
            if self.fault == "raises" and batch_idx in Classifier.seen:
                raise KeyError("labels are gone")
            Classifier.seen.add(batch_idx)
            if self.fault == "dies" and batch_idx == 1:
                os._exit(1)
            if self.fault == "spoiled" and batch_idx == 1:
                inputs = inputs * torch.nan
        loss = functional.cross_entropy(self.net(inputs), classes)
        if self.fault == "scaled" and self.global_rank == 1 and self.global_step >= SCALED_FROM:
            loss = 8 * loss
        if not torch.compiler.is_compiling():  # dynamo fails to trace self.log, guarded or not
            self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Save(Callback):
    """Writes what this rank saw when training ends."""

    def __init__(self, path, safety):
        self.path, self.safety, self.reports = path, safety, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.safety and self.safety.guards[0].last not in [None, *self.reports]:
            self.reports.append(self.safety.guards[0].last)

    def on_train_end(self, trainer, pl_module):
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        found = {
            "after": pl_module.state_dict(),
            "reports": list(map(asdict, self.reports)),
            "logged": logged,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        torch.save(found, self.path / f"rank{trainer.global_rank}.pt")


WATCHED = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True, "has_unused": True},
    "static_graph": {"static_graph": True},
    "accumulated": {"accumulate_grad_batches": 2},
    "manual": {"is_manual": True},
    "bf16": {"precision": "bf16-mixed"},
    "scaled": {"is_scaled": True},
    "compiled": {"is_compiled": True},
}
FAULTY = {
    "raises": {"lr": 0.05, "fault": "raises"},
    "raises while clipped": {"lr": 3.0, "fault": "raises"},
    "spoiled": {"lr": 0.05, "fault": "spoiled"},
    "dies": {"lr": 0.05, "fault": "dies"},
    "off": {"lr": 0.01, "fault": "scaled", "max_epochs": 30},
}


def main(output, num_ranks, *names):
    torch.set_num_threads(1)
    for name in names:
        if name == "clipped":
            fit(output / name, num_ranks, WorkerConsistency(), lr=3.0, logger=True)
        elif name == "named":
            options = {"static_graph": True, "logger": True}
            fit(output / name, num_ranks, WorkerConsistency(), **FAULTY["spoiled"], **options)
        elif name == "off":
            fit(output / name, num_ranks, WorkerConsistency(), logger=True, **FAULTY[name])
        elif name == "resumed":
            whole, options = output / "uninterrupted", {"lr": 3.0, "dropout": 0.0, "max_epochs": 2}
            checkpoints = ModelCheckpoint(output / "checkpoints", "{epoch}", save_top_k=-1)
            fit(whole, num_ranks, checkpoints, enable_checkpointing=True, **options)
            ckpt_path = output / "checkpoints" / "epoch=0.ckpt"
            fit(output / name, num_ranks, ckpt_path=ckpt_path, **options)
        elif name in FAULTY:
            fit(output / name, num_ranks, **FAULTY[name])
        else:
            options = {"lr": 0.05, **WATCHED[name]}
            fit(output / name, num_ranks, action="monitor", **options)
            fit(output / f"{name} unguarded", num_ranks, action=None, **options)


def fit(
    path, num_ranks, *callbacks, lr, action="clip", is_manual=False, has_unused=False, fault=None,
    is_scaled=False, is_compiled=False, logger=False, find_unused_parameters=False,
    static_graph=False, dropout=0.2, ckpt_path=None, **options,
):  # fmt: skip
    seed_everything(0, verbose=False)
    inputs = torch.randn(64, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 8, shuffle=True)
    safety = StepSafety(action=action) if action else None
    module = Classifier(lr, is_manual, has_unused, fault, dropout)
    if is_compiled:
        module = torch.compile(module, backend="aot_eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if is_scaled else None
    Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=DDPStrategy(
            start_method="fork",
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
        ),
        log_every_n_steps=1,
        default_root_dir=path,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([safety] if safety else []), *callbacks, Save(path, safety)],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if is_scaled else None,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    ).fit(module, loader, ckpt_path=ckpt_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
