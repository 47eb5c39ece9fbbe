"""StepSafety beside other parts of Lightning, which it leaves alone and which leave it alone."""

import copy
import sys
import warnings

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, cli
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from safestep.callbacks import StepSafety, WorkerConsistency


class Classifier(LightningModule):
    """A network with BatchNorm, a schedule for its learning rate, and validation."""

    def __init__(self, lr: float = 0.05, schedule: str | None = None):
        super().__init__()
        self.lr, self.schedule, self.batch_size = lr, schedule, 16
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)
            )

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        return functional.cross_entropy(self(inputs), classes)

    def validation_step(self, batch, batch_idx):
        inputs, classes = batch
        self.log("accuracy", (self(inputs).argmax(1) == classes).float().mean())

    def train_dataloader(self):
        return self.loader(shuffle=True)

    def val_dataloader(self):
        return self.loader(shuffle=False)

    def loader(self, **options):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(64, 8, generator=generator)
        data = TensorDataset(inputs, inputs[:, :4].argmax(1))
        return DataLoader(data, self.batch_size, **options)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": self.schedule}]


class Reports(Callback):
    """Collects the report of every step."""

    def __init__(self, safety):
        self.safety, self.reports = safety, []

    def on_train_batch_end(self, *_):
        self.reports.append(self.safety.guards[0].last)


@pytest.fixture
def guarded_and_plain(fit):
    """Return a function that trains with a monitoring guard and without, and compares bits."""

    def compare(make_module, make_callbacks=lambda: [], **options):
        safety = StepSafety(action="monitor")
        reports = Reports(safety)
        modules = make_module(), make_module()
        fit(modules[0], safety, *make_callbacks(), reports, data=False, **options)
        fit(modules[1], *make_callbacks(), data=False, **options)
        states = [list(module.state_dict().values()) for module in modules]
        assert all(map(torch.equal, *states))
        assert {report.status for report in reports.reports} == {"ok"}
        return reports.reports

    return compare


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_step_safety_reports_the_learning_rate_of_the_schedule(guarded_and_plain, schedule):
    reports = guarded_and_plain(lambda: Classifier(schedule=schedule))

    rates = [report.learning_rate for report in reports]
    halvings = range(8) if schedule == "step" else [0] * 4 + [1] * 4
    assert rates == pytest.approx([0.05 * 0.5**n for n in halvings])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"overfit_batches": 2}, 4),
        ({"num_sanity_val_steps": 2, "val_check_interval": 0.5}, 8),
        ({"max_steps": 3}, 3),
        ({"detect_anomaly": True}, 8),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 8),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_step_safety_sees_every_step_of_a_trainer_with(guarded_and_plain, options, steps):
    assert len(guarded_and_plain(Classifier, **options)) == steps


def test_step_safety_leaves_weight_averaging_alone(guarded_and_plain):
    def average():
        return [WeightAveraging(avg_fn=get_ema_avg_fn(0.9))]

    assert len(guarded_and_plain(Classifier, average)) == 8


def test_step_safety_leaves_stochastic_weight_averaging_alone(guarded_and_plain):
    def average():
        return [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]

    reports = guarded_and_plain(Classifier, average, max_epochs=3)

    assert max(report.step for report in reports) == 11


def test_step_safety_stays_out_of_a_search_for_the_learning_rate(guarded_and_plain):
    def search():
        return [LearningRateFinder(num_training_steps=8)]

    reports = guarded_and_plain(Classifier, search)

    assert [report.step for report in reports] == list(range(8))


def test_step_safety_stays_out_of_a_search_in_the_middle_of_training(guarded_and_plain):
    class EveryEpoch(LearningRateFinder):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    reports = guarded_and_plain(Classifier, lambda: [EveryEpoch(num_training_steps=8)])

    assert [report.step for report in reports] == list(range(8))


@pytest.mark.slow
def test_step_safety_stays_out_of_a_search_for_the_batch_size(guarded_and_plain):
    def search():
        return [BatchSizeFinder(init_val=8, max_trials=2, steps_per_trial=1)]

    reports = guarded_and_plain(Classifier, search)

    assert [report.step for report in reports] == list(range(len(reports)))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["module", "net"])
def test_step_safety_measures_compiled_modules(fit, compiled):
    def make():
        module = Classifier()
        if compiled == "net":
            module.net = torch.compile(module.net, backend="aot_eager")
            return module
        return torch.compile(module, backend="aot_eager")

    safety = StepSafety(action="monitor")
    eager = StepSafety(action="monitor")
    guarded, plain = make(), make()

    fit(guarded, safety, data=False, max_epochs=1)
    fit(plain, data=False, max_epochs=1)
    fit(Classifier(), eager, data=False, max_epochs=1)

    assert safety.last[0].status == "ok"
    assert safety.last[0].normalized_step == pytest.approx(eager.last[0].normalized_step, rel=1e-3)
    assert all(map(torch.equal, guarded.parameters(), plain.parameters()))


def test_step_safety_survives_a_module_that_is_copied_while_training(fit):
    class Copying(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.copied = copy.deepcopy(pl_module.net)

    copying, safety = Copying(), StepSafety()

    fit(Classifier(), safety, copying, data=False)

    assert copying.copied(torch.randn(2, 8)).shape == (2, 4)


def test_step_safety_guards_a_bare_bones_trainer():
    safety, module = StepSafety(max_normalized_step=0.1), Classifier()
    trainer = Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[safety])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec|.*does not have many workers")
        warnings.filterwarnings("ignore", r"You are trying to `self.log\(\)`")  # in validation
        trainer.fit(module)

    assert safety.last[0].status == "clipped"


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings(r"ignore:You are trying to `self.log\(\)`")
@pytest.mark.parametrize("callback", [StepSafety, WorkerConsistency])
def test_callbacks_warn_at_the_line_that_starts_the_training(callback):
    class NoSecondRun(Classifier):
        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled():
                raise ValueError("not without gradients")
            return super().training_step(batch, batch_idx)

    trainer = Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[callback()])

    with pytest.warns(UserWarning, match=r"ValueError: not without|nothing is measured") as found:
        trainer.fit(NoSecondRun())

    messages = ("SafeStep: ", "WorkerConsistency: ")
    (warning,) = [one for one in found if str(one.message).startswith(messages)]
    assert warning.filename == __file__


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings(r"ignore:You are trying to `self.log\(\)`")
def test_step_safety_is_configured_by_lightning_cli(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = [
        "fit",
        "--seed_everything=0",
        "--trainer.callbacks=safestep.callbacks.StepSafety",
        "--trainer.callbacks.radius=certified",
        "--trainer.callbacks.quantile=0.5",
        "--trainer.callbacks.max_normalized_step=0.25",
        "--trainer.callbacks.run_dir=" + str(tmp_path / "run"),
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]

    command = cli.LightningCLI(Classifier, args=arguments, save_config_callback=None)

    safety = next(c for c in command.trainer.callbacks if isinstance(c, StepSafety))
    assert safety.last[0].step == 3
    assert "uncertified" in safety.last[0].estimator
    header = (tmp_path / "run" / "run.jsonl").read_text().splitlines()[0]
    assert '"max_normalized_step": 0.25' in header


def parse(*options):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    arguments = ["--callback=safestep.callbacks.StepSafety", *options]
    return parser.instantiate(parser.parse_args(arguments)).callback


def test_step_safety_has_options_that_a_command_line_reads(fit):
    safety = parse("--callback.radius=certified", "--callback.quantile=0.5")

    fit(Classifier(), safety, data=False, max_epochs=1)

    assert "0.5 quantile, uncertified" in safety.last[0].estimator


@pytest.mark.parametrize(
    "option", ["radius=exact", "quantile=half", "action=7", "estimator=none", "limit=1"], ids=str
)
def test_step_safety_has_types_that_a_command_line_refuses(option):
    with pytest.raises(jsonargparse.ArgumentError, match=option.split("=")[0]):
        parse(f"--callback.{option}")
