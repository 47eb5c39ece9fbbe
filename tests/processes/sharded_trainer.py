"""StepSafety on sharded modules: ``sharded_trainer.py OUTPUT NUM_RANKS SCENARIO...``."""

import os
import sys
from dataclasses import asdict

import torch
from launch import run
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from safestep.callbacks import StepSafety, WorkerConsistency

SCENARIOS = {
    "clipped": {"lr": 3.0},
    "replicated": {"lr": 3.0, "kind": "replicated"},
    "manual": {"lr": 3.0, "is_manual": True},
    "accumulated": {"lr": 3.0, "accumulate_grad_batches": 2},
    "bf16-true": {"lr": 0.01, "action": "monitor", "precision": "bf16-true"},
    "watched": {"lr": 0.05, "action": "monitor"},
    "unguarded": {"lr": 0.05, "action": None},
    "tensor parallel": {"lr": 0.05, "kind": "tensor parallel"},
    "flattened": {"lr": 0.05, "kind": "flattened"},
    "flattened, unguarded": {"lr": 0.05, "kind": "flattened", "action": None},
}


class Sharded(LightningModule):
    """A classifier, with layers whose sizes do not divide, that shards itself."""

    def __init__(self, lr, is_manual, kind):
        super().__init__()
        self.lr, self.kind = lr, kind
        self.automatic_optimization = not is_manual
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.Tanh())
        self.net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), block, nn.Linear(7, 4, bias=False))
        if self.kind == "flattened":
            self.net = FullyShardedDataParallel(
                self.net, device_id=torch.device("cpu"), use_orig_params=True
            )
        elif self.kind == "tensor parallel":
            plan = {"0": ColwiseParallel(output_layouts=Replicate())}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        else:
            mesh = self.device_mesh["data_parallel"]
            if self.kind == "replicated":
                shape = (2, mesh.size() // 2)
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        loss = functional.cross_entropy(self.net(inputs), classes)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr, foreach=False)


class Watch(Callback):
    """Keeps what this rank saw: parameters around each batch, inputs, reports."""

    def __init__(self, safety):
        self.safety, self.batches, self.reports = safety, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = gathered(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((self.before, gathered(pl_module.net), batch[0]))
        if self.safety and self.safety.last[0] not in [None, *self.reports]:
            self.reports.append(self.safety.last[0])


class FSDPOnCpu(FSDPStrategy):
    """The Trainer refuses FSDPStrategy itself without a GPU."""


def strategy_for(kind):
    sizes = [int(sys.argv[2]), 1]
    if kind == "flattened":
        return FSDPOnCpu()
    return ModelParallelStrategy(*(reversed(sizes) if kind == "tensor parallel" else sizes))


def gathered(net):
    """Return whole parameters; of those that FullyShardedDataParallel flattened, the own part."""
    held = {name: param.detach() for name, param in net.named_parameters()}
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in held.items()}
    return {name: param.clone() for name, param in whole.items()}


def fit(
    path,
    *,
    lr,
    action="clip",
    is_manual=False,
    kind="sharded",
    ckpt_path=None,
    others=(),
    **options,
):
    seed_everything(0, verbose=False)
    inputs = torch.randn(64, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), 8, shuffle=True)
    safety = StepSafety(action=action) if action else None
    watch = Watch(safety)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(sys.argv[2]),
        strategy=strategy_for(kind),
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([safety] if safety else []), watch, *others],
        **{"max_epochs": 1, **options},
    )
    trainer.fit(Sharded(lr, is_manual, kind), loader, ckpt_path=ckpt_path)
    return trainer, watch


def resumed(path):
    """Return the batches of the second epoch, of one run and of one resumed from a checkpoint."""
    trainer, _ = fit(path, lr=3.0)
    trainer.save_checkpoint(path / "checkpoint")
    _, whole = fit(path, lr=3.0, max_epochs=2)
    _, resumed = fit(path, lr=3.0, max_epochs=2, ckpt_path=path / "checkpoint")
    return {"whole": seen(whole), "resumed": seen(resumed)}


class Losses(Callback):
    """Keeps the loss of each batch and the report of each step."""

    def __init__(self, consistency):
        self.consistency, self.losses, self.reports = consistency, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        if self.consistency.last not in [None, *self.reports]:
            self.reports.append(self.consistency.last)


def consistency(path):
    watched = WorkerConsistency()
    losses = Losses(watched)
    fit(path, lr=0.05, action=None, accumulate_grad_batches=2, others=(watched, losses))
    return {"losses": losses.losses, "reports": losses.reports}


def seen(watch):
    return {"batches": watch.batches, "reports": list(map(asdict, watch.reports))}


def main(rank, output, names):
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does: the Trainer starts no processes
    whole = {"resumed": resumed, "consistency": consistency}
    for name in names:
        found = whole[name](output) if name in whole else seen(fit(output, **SCENARIOS[name])[1])
        torch.save(found, f"{output}/{name} {rank}.pt")


if __name__ == "__main__":
    from pathlib import Path

    run(main, int(sys.argv[2]), Path(sys.argv[1]), sys.argv[3:])
