"""What StepSafety writes: to the trainer's loggers, its progress bar, the run log, the terminal."""

import json
import logging
import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional

from safestep import read_run
from safestep.callbacks import StepSafety


class Classifier(LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        return functional.cross_entropy(self.net(inputs), classes)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def scaler():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]


def test_step_safety_logs_its_names_and_the_run(fit, tmp_path):
    safety = StepSafety(audit_interval=1)
    logger = CSVLogger(tmp_path, name="logs")

    trainer = fit(Classifier(), safety, logger=logger)

    names = {
        "normalized_step", "radius", "step_norm", "scale", "effective_lr", "gradient_ratio",
        "divergence", "loss_slope", "predicted_change",
    }  # fmt: skip
    assert {f"safestep/{name}" for name in names} <= set(trainer.logged_metrics)
    assert "r" in trainer.progress_bar_metrics
    assert "r" not in trainer.logged_metrics
    run = read_run(trainer.log_dir)
    assert len(run.steps["normalized_step"]) == 8
    assert run.steps["gradient_ratio"] == pytest.approx([1.0] * 8, rel=1e-4)
    assert (run.steps["divergence"] > 0).all()
    assert (run.steps["loss_slope"] < 0).all()
    last = safety.last[0].normalized_step
    assert run.steps["normalized_step"][-1] == last
    assert float(trainer.logged_metrics["safestep/normalized_step"]) == pytest.approx(last)


def test_step_safety_logs_at_every_n_steps_only(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="logs", flush_logs_every_n_steps=1000)
    rows = []
    logger.log_metrics = lambda metrics, step: rows.append((step, metrics))

    fit(Classifier(), StepSafety(), logger=logger, log_every_n_steps=3)

    assert [step for step, metrics in rows if "safestep/scale" in metrics] == [2, 5]


def test_after_the_first_steps_numbers_are_logged_only_where_loggers_write_them(
    fit, loader, tmp_path
):
    class Counting(Classifier):
        logged = ()

        def log(self, name, *args, **kwargs):
            self.logged = (*self.logged, (name, self.trainer.global_step))
            super().log(name, *args, **kwargs)

    logger = CSVLogger(tmp_path, name="logs", flush_logs_every_n_steps=1000)
    rows = []
    logger.log_metrics = lambda metrics, step: rows.append((step, metrics))
    module = Counting()

    options = {"logger": logger, "log_every_n_steps": 7, "max_epochs": 4}
    fit(module, StepSafety(), data=loader(batch_size=4), **options)

    steps = [step for name, step in module.logged if name == "safestep/scale"]
    assert steps == [*range(1, 51), 56, 63]
    written = [step + 1 for step, metrics in rows if "safestep/scale" in metrics]
    assert written == list(range(7, 64, 7))
    assert len({metrics["safestep/step_norm"] for _, metrics in rows}) == len(rows)  # none is old


@pytest.mark.parametrize("plugins", [None, scaler], ids=["float32", "scaled"])
def test_step_safety_writes_the_mean_loss_of_accumulated_batches(fit, tmp_path, plugins):
    class Remembering(Classifier):
        losses = ()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            Remembering.losses += (outputs["loss"].item(),)  # divided by accumulate_grad_batches

    safety = StepSafety(run_dir=tmp_path / "run")
    plugins = plugins() if plugins else None

    fit(Remembering(), safety, accumulate_grad_batches=2, max_epochs=1, plugins=plugins)

    lines = (tmp_path / "run" / "run.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    written = [record["loss"] for record in records if record["kind"] == "step"]
    first, second, third, fourth = Remembering.losses
    expected = [first + second, third + fourth]
    assert written == pytest.approx(expected, rel=1e-3)  # float16 autocast: the loss is rounded


@pytest.mark.parametrize("plugins", [None, scaler], ids=["float32", "scaled"])
def test_the_audited_gradient_is_that_of_the_mean_loss_and_clipped_as_lightning_clips(fit, plugins):
    norms = []

    class Clipped(Classifier):
        def configure_gradient_clipping(self, *_, **__):
            norms.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.05)))

    ratios = []

    class Noting(StepSafety):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            ratios.append(self.last[0] and self.last[0].gradient_ratio)

    plugins = plugins() if plugins else None
    safety = Noting(audit_interval=1)
    fit(Clipped(), safety, accumulate_grad_batches=2, max_epochs=1, plugins=plugins)

    assert ratios[1::2] == pytest.approx([0.05 / norm for norm in norms], rel=5e-3)


def test_step_safety_writes_no_run_log_without_a_logger(fit, tmp_path):
    fit(Classifier(), StepSafety(), max_epochs=1)

    assert not list(tmp_path.rglob("run.jsonl"))


def test_step_safety_says_in_one_line_how_it_intervened(fit, caplog):
    safety = StepSafety()

    with caplog.at_level(logging.INFO, logger="safestep"):
        fit(Classifier(lr=100.0), safety, max_epochs=8)

    lines = [record.message for record in caplog.records if "scaled by" in record.message]
    number = r"[\d.e+-]+"
    form = rf"step \d+: r = {number}, radius {number}, scaled by {number} \(row \d+; .*\)"
    assert all(re.fullmatch(form, line) for line in lines)
    # Of 32 clipped steps, the first ten and those at powers of two.
    assert safety.last[0].step == 31
    assert len(lines) == 12
