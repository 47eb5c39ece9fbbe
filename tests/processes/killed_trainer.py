"""Train with Lightning in a process of its own, which may be killed at any moment.

Usage: ``killed_trainer.py FOLDER NUM_KILLS SEED``. As in ``killed_run.py``: a forked child trains
from the last checkpoint that ModelCheckpoint left, and is killed with SIGKILL after a random time.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import read_run
from safestep.callbacks import StepSafety

EPOCHS, BATCHES = 5, 16


class Batches:
    """Batches that go on where a checkpoint left them, without which Lightning begins anew."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(BATCHES, 16, 8, generator=generator)
        self.num_given = 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        for inputs in self.inputs[self.num_given % BATCHES :]:
            self.num_given += 1
            yield inputs, inputs[:, :4].argmax(1)

    def state_dict(self):
        return {"num_given": self.num_given}

    def load_state_dict(self, state):
        self.num_given = state["num_given"]


class Classifier(LightningModule):
    """A small classifier whose larger steps are clipped."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, _):
        inputs, targets = batch
        loss = cross_entropy(self.layers(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.3)


def train(folder: Path, *, copy: bool = True) -> None:
    """Train from the last checkpoint in `folder`, if there is one, and leave the end there."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    checkpoint = ModelCheckpoint(
        folder, "at-{step}", every_n_train_steps=3, save_top_k=-1, save_on_train_epoch_end=False
    )
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[StepSafety(run_dir=folder, copy=copy), checkpoint],
        use_distributed_sampler=False,
    )  # fmt: skip
    model = Classifier()
    trainer.fit(model, Batches(), ckpt_path=newest(folder))
    torch.save(model.state_dict(), folder / "final.part")
    os.replace(folder / "final.part", folder / "final.pt")


def newest(folder: Path) -> Path | None:
    """Return the last checkpoint that was written whole; a kill may tear the one under way."""
    found = sorted(folder.glob("at-*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    while found:
        try:
            torch.load(found[-1], weights_only=False)
        except Exception:
            found.pop().unlink()
            continue
        return found[-1]
    return None


def start(folder: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            train(folder)
        finally:
            os._exit(0 if (folder / "final.pt").exists() else 1)
    return child


def main() -> None:
    """Kill the child, look at the log, and go on."""
    warnings.simplefilter("ignore")
    folder, num_kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    folder.mkdir(parents=True)
    killed_at, wrong = [], []
    while len(killed_at) < num_kills:
        child, log = start(folder), folder / "run.jsonl"
        size = log.stat().st_size if log.exists() else 0
        size += chance.choice(range(0, 8000, 500))  # how far it gets: up to about twelve steps
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and log.stat().st_size > size):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = read_run(folder)
        steps = run.steps["step"].tolist()
        killed_at.append(max(steps, default=-1))
        if sorted(set(steps)) != list(range(killed_at[-1] + 1)) or run.left_out:
            wrong.append(f"kill {len(killed_at)}: {run.left_out} {len(set(steps))} steps")
        (folder / "final.pt").unlink(missing_ok=True)
    _, status = os.waitpid(start(folder), 0)
    sys.stdout.write(json.dumps({"killed_at": killed_at, "wrong": wrong, "status": status}))


if __name__ == "__main__":
    main()
