"""StepSafety under automatic optimization: what it measures and what it leaves alone."""

import copy
import inspect
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional

from safestep import SafeStep
from safestep.callbacks import StepSafety
from safestep.runlog.reader import list_runs, read_run

TEMPERATURE = 0.5


class Classifier(LightningModule):
    """Dropout and BatchNorm before a softmax with a temperature, which only the loss knows of."""

    def __init__(self, lr=0.1, dropout=0.2, optimizer=torch.optim.Adam):
        super().__init__()
        self.lr, self.optimizer = lr, optimizer
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, last = nn.Linear(8, 16), nn.Linear(16, 4)
        drop = nn.Dropout(dropout)
        self.net = nn.Sequential(first, nn.BatchNorm1d(16), nn.Tanh(), drop, last)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        loss = functional.cross_entropy(self(inputs) / TEMPERATURE, classes)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class Probe(Callback):
    """Keeps the network before and after every batch, the batches, and the reports."""

    def __init__(self, safety):
        self.safety = safety
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = copy.deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = copy.deepcopy(pl_module.net)
        self.steps.append((self.before, after, batch[0], self.safety.guards[0].last))


def state_of(trainer):
    """Return everything that training changed: the module's state and the optimizer's."""
    model = list(trainer.lightning_module.state_dict().values())
    moments = [
        value
        for entry in trainer.optimizers[0].state_dict()["state"].values()
        for value in entry.values()
    ]
    return [torch.as_tensor(value) for value in model + moments]


def assert_same_bits(one, other):
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_step_safety_measures_the_step_of_training_step_with_its_temperature(
    fit, dense_normalized_step
):
    safety = StepSafety(action="monitor")
    probe = Probe(safety)

    fit(Classifier(dropout=0.0), safety, probe)

    assert len(probe.steps) == 8
    for before, after, inputs, report in probe.steps:
        reference = dense_normalized_step(before, after, inputs) / TEMPERATURE
        # float32 against float64
        assert report.normalized_step == pytest.approx(reference, rel=1e-4)


def test_step_safety_clips_a_long_step_to_the_limit(fit, dense_normalized_step):
    safety = StepSafety(max_normalized_step=0.5)
    probe = Probe(safety)

    fit(Classifier(lr=10.0, dropout=0.0), safety, probe, max_steps=2)

    for before, after, inputs, report in probe.steps:
        assert report.status == "clipped"
        applied = dense_normalized_step(before, after, inputs) / TEMPERATURE
        assert applied == pytest.approx(0.5, rel=1e-4)  # float32 against float64


def test_step_safety_measures_all_accumulated_batches(fit, dense_normalized_step):
    safety = StepSafety(action="monitor")
    probe = Probe(safety)

    fit(Classifier(dropout=0.0), safety, probe, accumulate_grad_batches=2, max_epochs=1)

    for first, second in (probe.steps[0:2], probe.steps[2:4]):
        before, after, report = second[0], second[1], second[3]
        reference = dense_normalized_step(before, after, first[2], second[2]) / TEMPERATURE
        # BatchNorm's own statistics change between the batches, but not in train mode's logits.
        assert report.normalized_step == pytest.approx(reference, rel=1e-4)
    assert safety.last[0].step == 1


def scaler():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"plugins": scaler},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_step_safety_leaves_training_bitwise_alone_while_it_does_not_intervene(fit, options):
    options = {key: value() if callable(value) else value for key, value in options.items()}
    safety = StepSafety(action="monitor")

    guarded = fit(Classifier(), safety, **options)
    plain = fit(Classifier(), **options)

    assert safety.last[0].status == "ok"
    assert_same_bits(state_of(guarded), state_of(plain))


def test_step_safety_draws_the_dropout_mask_of_the_real_step(fit):
    """Random numbers are drawn, and the batch is changed, after our on_train_batch_start."""

    class Mixup(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch[0].mul_(1 + torch.rand(()))

    class Remembering(Classifier):
        masks = ()

        def training_step(self, batch, batch_idx):
            self.masks.append(functional.dropout(torch.ones(9)))  # a list that is never swapped
            return super().training_step(batch, batch_idx)

    module = Remembering()
    Remembering.masks = []
    safety = StepSafety(action="monitor")

    fit(module, safety, Mixup(), max_steps=2)

    assert len(Remembering.masks) >= 4  # each step ran at least twice
    assert len(torch.stack(Remembering.masks).unique(dim=0)) == 2
    assert safety.last[0].status == "ok"


def test_step_safety_runs_training_step_again_without_a_trace(fit, tmp_path, capsys):
    class Loud(Classifier):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"by_hand": 1.0}, step=self.global_step)
            self.print("step", batch_idx)
            self.log_dict({"twice": 1.0}, on_step=True, on_epoch=True, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="loud")
    safety = StepSafety(action="monitor")

    trainer = fit(Loud(), safety, logger=logger, max_epochs=1)

    assert safety.last[0].status == "ok"
    assert trainer.callback_metrics["twice_epoch"] == 4
    assert sum("by_hand" in row for row in logger.experiment.metrics) <= 4
    assert capsys.readouterr().out.count("step") == 4


def test_step_safety_goes_on_unmeasured_where_training_step_cannot_run_twice(fit):
    class Once(Classifier):
        seen = frozenset()

        def training_step(self, batch, batch_idx):
            key = (self.current_epoch, batch_idx)
            if key in Once.seen:
                raise KeyError("labels are gone")
            Once.seen |= {key}
            return super().training_step(batch, batch_idx)

    safety = StepSafety()

    with pytest.warns(UserWarning, match="not measured and left alone: KeyError: 'labels are gone"):
        guarded = fit(Once(lr=10.0), safety)
    plain = fit(Classifier(lr=10.0))

    assert safety.last[0].status == "unmeasured"
    assert "labels are gone" in safety.last[0].reason
    assert_same_bits(state_of(guarded), state_of(plain))


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_step_safety_finds_the_logits_of_a_step_that_fetches_its_own_batches(fit):
    class Fetching(Classifier):
        def training_step(self, dataloader_iter):
            (inputs, classes), _, _ = next(dataloader_iter)
            return functional.cross_entropy(self.net(inputs), classes)

    safety = StepSafety(action="monitor")

    fit(Fetching(), safety, max_epochs=1)

    assert (safety.last[0].step, safety.last[0].status) == (3, "ok")


def test_step_safety_measures_a_step_that_pops_from_its_batch(fit):
    class Popping(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"inputs": batch[0], "labels": [batch[1]]}

        def training_step(self, batch, batch_idx):
            classes = batch.pop("labels").pop()
            return functional.cross_entropy(self(batch["inputs"]), classes)

    safety = StepSafety(action="monitor")

    fit(Popping(), safety)

    assert safety.last[0].status == "ok"


def test_step_safety_takes_its_logits_from_what_training_step_returns(fit):
    class Returning(Classifier):
        def training_step(self, batch, batch_idx):
            inputs, classes = batch
            values = self(inputs)
            return {"loss": functional.cross_entropy(values, classes), "values": values}

    told = StepSafety(action="monitor", logits=lambda output: output["values"])
    found = StepSafety(action="monitor")

    fit(Returning(), told, max_epochs=1)
    fit(Returning(), found, max_epochs=1)

    assert told.last[0].normalized_step == pytest.approx(found.last[0].normalized_step, rel=1e-6)


def test_step_safety_forgets_the_batch_of_a_step_that_the_scaler_left_out(fit):
    class Overflowing(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 1 else loss

    safety = StepSafety(action="monitor")
    calls = []

    class Count(Callback):
        def on_train_batch_end(self, *_):
            calls.append(len(safety.guards[0]._recorder.take()))

    fit(Overflowing(), safety, Count(), plugins=scaler(), max_epochs=1)

    assert safety.last[0].step == 2  # three steps were made of four batches
    assert safety.last[0].status == "ok"
    assert calls == [0, 1, 0, 0]


def test_step_safety_undoes_a_step_that_is_not_finite(fit):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if batch_idx == 2 else loss

    safety = StepSafety(action="clip")
    statuses = []

    class Watch(Callback):
        def on_train_batch_end(self, *_):
            statuses.append(safety.guards[0].last.status)

    trainer = fit(Broken(lr=1e-3), safety, Watch(), max_epochs=1)

    assert statuses == ["ok", "ok", "skipped", "ok"]
    assert all(value.isfinite().all() for value in state_of(trainer))


def test_step_safety_resumes_bitwise(fit, tmp_path):
    whole, first, second = StepSafety(), StepSafety(), StepSafety()
    uninterrupted = fit(Classifier(lr=1.0, dropout=0.0), whole, max_epochs=3)

    halted = fit(Classifier(lr=1.0, dropout=0.0), first, max_epochs=1)
    halted.save_checkpoint(tmp_path / "first.ckpt")
    resumed = fit(
        Classifier(lr=1.0, dropout=0.0), second, max_epochs=3, ckpt_path=tmp_path / "first.ckpt"
    )

    assert whole.last[0].step == second.last[0].step == 11
    assert whole.last[0].normalized_step == second.last[0].normalized_step
    assert_same_bits(state_of(resumed), state_of(uninterrupted))
    (state,) = first.state_dict()["guards"]
    assert state["step"] == state["predictor"]["steps"] == 4
    assert state["skips_in_a_row"] == 0


def test_step_safety_refuses_a_checkpoint_of_more_optimizers(fit):
    safety = StepSafety()
    safety.load_state_dict({"guards": [{"step": 1, "skips_in_a_row": 0}] * 2})

    with pytest.raises(ValueError, match="StepSafety: expected a checkpoint of 1 optimizers, got"):
        fit(Classifier(), safety)


def test_step_safety_lets_go_after_training_and_after_an_exception(fit):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise ArithmeticError("no more")
            return super().training_step(batch, batch_idx)

    safety = StepSafety()
    module = Failing()
    with pytest.raises(ArithmeticError, match="no more"):
        fit(module, safety)
    trainer = fit(Classifier(), safety)

    assert safety.guards == []
    assert "training_step" not in vars(module)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not module._forward_pre_hooks


def test_step_safety_ends_a_run_that_skips_every_step(fit):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.nan

    with pytest.raises(RuntimeError, match="3 steps in a row were not taken"):
        fit(Broken(), StepSafety(max_consecutive_skips=3))


def test_step_safety_takes_the_options_of_safestep():
    ours = dict(inspect.signature(StepSafety, eval_str=True).parameters)
    theirs = dict(inspect.signature(SafeStep, eval_str=True).parameters)
    for name in ("optimizer", "model", "process_group", "part"):
        del theirs[name]

    assert {name: (p.default, p.annotation) for name, p in ours.items()} == {
        name: (p.default, p.annotation) for name, p in theirs.items()
    }


def test_step_safety_guards_a_stopped_run_to_its_last_step(fit):
    safety = StepSafety(action="monitor")

    trainer = fit(Classifier(), safety, Timer(duration={"hours": 1}), max_steps=3)

    assert trainer.global_step == 3
    assert safety.last[0].step == 2
    assert math.isfinite(safety.last[0].normalized_step)


class Resumable:
    """Batches that go on where a checkpoint left them, without which Lightning begins anew."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(6, 16, 8, generator=generator)
        self.batches = [(batch, batch[:, :4].argmax(1)) for batch in inputs]
        self.num_given = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches[self.num_given % len(self) :]:
            self.num_given += 1
            yield batch

    def state_dict(self):
        return {"num_given": self.num_given}

    def load_state_dict(self, state):
        self.num_given = state["num_given"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("copy", [True, False, None], ids=["copies", "ahead", "unguarded"])
def test_step_safety_resumes_mid_epoch_bitwise_in_the_same_run(fit, tmp_path, accumulate, copy):
    """With batches that resume, Lightning itself is exact, as the unguarded run shows."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            # In the second epoch, of six batches; gradients in the making are in no checkpoint.
            if trainer.fit_loop.epoch_loop.total_batch_idx == 7:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    def train(folder, *callbacks, **options):
        options = {"accumulate_grad_batches": accumulate, "data": Resumable(), **options}
        module = Classifier(lr=1.0, dropout=0.0)
        if copy is None:
            return fit(module, *callbacks, **options)
        run_dir = tmp_path / folder
        safety = StepSafety(run_dir=run_dir, copy=copy, max_normalized_step=0.5)
        return fit(module, safety, *callbacks, **options)

    whole = train("whole", max_epochs=3)
    train("halted", Save(), max_epochs=2)
    resumed = train("halted", max_epochs=3, ckpt_path=tmp_path / "last.ckpt")

    assert_same_bits(state_of(resumed), state_of(whole))
    if copy is None:
        return
    run, unhalted = read_run(tmp_path / "halted"), read_run(tmp_path / "whole")
    for name in ("step", "status", "scale", "loss"):
        assert run[name].tolist() == unhalted[name].tolist()
    assert "clipped" in run["status"]
    assert len(list_runs(tmp_path / "halted")) == 1
