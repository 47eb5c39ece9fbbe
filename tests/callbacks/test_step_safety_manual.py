"""StepSafety under manual optimization: training_step makes the optimizer steps itself."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional

from safestep import read_run
from safestep.callbacks import StepSafety
from safestep.callbacks.submodule import smallest_submodule


class Manual(LightningModule):
    """A classifier whose hidden layers and head have an optimizer each."""

    def __init__(self, lr=0.1, num_optimizers=1):
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.num_optimizers = lr, num_optimizers
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(functional.cross_entropy(self.net(inputs), classes))
        self.before = copy.deepcopy(self.net)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        parts = [self.net] if self.num_optimizers == 1 else [self.net[0], self.net[2]]
        return [torch.optim.Adam(part.parameters(), lr=self.lr) for part in parts]


class Adversarial(LightningModule):
    """A generator and a discriminator, each with its own optimizer and its own steps."""

    def __init__(self, safety=None):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(
                nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8)
            )
            self.discriminator = nn.Sequential(
                nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
            )
        self.safety, self.steps = safety, []

    def fake(self, noise):
        """Return what the generator makes of noise, changed by what is not a module."""
        return self.generator(noise).flip(1) * 0.5

    def generator_loss(self, noise):
        logits = self.discriminator(self.fake(noise))
        self.log("generated", float(len(noise)), on_epoch=True, reduce_fx="sum")
        return functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

    def training_step(self, batch, batch_idx):
        real = batch[0]
        of_generator, of_discriminator = self.optimizers()
        pair = torch.cat([real, self.fake(torch.randn(len(real), 2)).detach()])
        is_real = (torch.arange(len(pair)) < len(real)).float()[:, None]
        loss = functional.binary_cross_entropy_with_logits(self.discriminator(pair), is_real)
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        self.step(of_discriminator, self.discriminator, pair)
        if batch_idx % 2:
            noise = torch.randn(len(real), 2)
            if self.safety is not None:
                self.safety.record(0, self.generator_loss, noise)
            of_generator.zero_grad()
            self.manual_backward(self.generator_loss(noise))
            self.step(of_generator, Chained(self), noise)

    def step(self, optimizer, model, inputs):
        before = copy.deepcopy(model)
        optimizer.step()
        self.steps.append((before, copy.deepcopy(model), inputs))

    def configure_optimizers(self):
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=self.lr) for part in parts]

    lr = 1e-2


class Chained(nn.Module):
    """The two networks of a GAN as one function, whose logits are of two classes."""

    def __init__(self, gan):
        super().__init__()
        self.generator, self.discriminator = gan.generator, gan.discriminator

    def forward(self, noise):
        logit = self.discriminator(self.generator(noise).flip(1) * 0.5)
        return torch.cat([logit, torch.zeros_like(logit)], 1)


def test_step_safety_measures_manual_steps(fit, dense_normalized_step):
    safety = StepSafety(action="monitor")

    module = Manual()
    trainer = fit(module, safety, max_epochs=1)

    inputs = list(trainer.train_dataloader)[-1][0]
    assert safety.last[0].status == "ok"
    reference = dense_normalized_step(module.before, module.net, inputs)
    assert safety.last[0].normalized_step == pytest.approx(reference, rel=1e-4)  # float32
    assert safety.last[0].step == trainer.global_step - 1 == 3


def test_step_safety_clips_manual_steps(fit, dense_normalized_step):
    module, safety = Manual(lr=10.0), StepSafety()

    trainer = fit(module, safety, max_steps=1)

    inputs = next(iter(trainer.train_dataloader))[0]
    assert safety.last[0].status == "clipped"
    applied = dense_normalized_step(module.before, module.net, inputs)
    assert applied == pytest.approx(1.0, rel=1e-4)  # float32


def scaler():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"plugins": scaler}],
    ids=["float32", "bf16-mixed", "bf16-true", "16-mixed"],
)
def test_step_safety_leaves_manual_training_bitwise_alone(fit, options):
    safety = StepSafety(action="monitor")
    guarded, plain = Manual(num_optimizers=2), Manual(num_optimizers=2)

    for module, callbacks in ((guarded, [safety]), (plain, [])):
        fit(module, *callbacks, **{k: v() if callable(v) else v for k, v in options.items()})

    assert {report.status for report in safety.last} == {"ok"}
    assert all(map(torch.equal, guarded.net.parameters(), plain.net.parameters()))


def test_step_safety_reports_two_optimizers_on_one_model_and_logs_the_sum(fit):
    safety = StepSafety(action="monitor")

    trainer = fit(Manual(num_optimizers=2), safety)

    metrics = trainer.callback_metrics
    reports = [report.normalized_step for report in safety.last]
    assert [float(metrics[f"safestep/normalized_step/{i}"]) for i in (0, 1)] == pytest.approx(
        reports
    )
    assert float(metrics["safestep/normalized_step"]) == pytest.approx(sum(reports))
    assert "safestep/scale/1" in metrics


@pytest.mark.filterwarnings("ignore:SafeStep. a step was not measured")
def test_step_safety_guards_each_optimizer_of_a_gan_at_its_own_steps(fit, tmp_path):
    safety = StepSafety(run_dir=tmp_path / "run")

    fit(Adversarial(), safety)

    generator, discriminator = safety.last
    assert (generator.step, discriminator.step) == (3, 7)
    assert discriminator.status == "ok"
    # What enters the generator's loss is the discriminator's output, outside of the generator.
    assert generator.status == "unmeasured"
    assert "StepSafety.record(i, step, *args) for optimizer i" in generator.reason
    run = read_run(tmp_path / "run")
    assert sorted(set(run.steps["optimizer"])) == [0, 1]
    assert list(run.steps["optimizer"]).count(1) == 8


class Reports(Callback):
    """Keeps every report of two guards, in the order of the steps."""

    def __init__(self, safety):
        self.safety, self.seen = safety, []

    def on_train_batch_end(self, *_):
        generator, discriminator = self.safety.last
        new = [discriminator, *([generator] if generator not in [None, *self.seen] else [])]
        self.seen += new


def test_step_safety_measures_a_generator_it_was_told_of(fit, dense_normalized_step):
    safety = StepSafety(action="monitor")
    module, reports = Adversarial(safety), Reports(safety)

    fit(module, safety, reports)

    assert len(reports.seen) == len(module.steps) == 12
    for report, (before, after, inputs) in zip(reports.seen, module.steps, strict=True):
        if not isinstance(before, Chained):
            before, after = as_two_classes(before), as_two_classes(after)
        assert report.status == "ok"
        expected = dense_normalized_step(before, after, inputs)
        assert report.normalized_step == pytest.approx(expected, rel=1e-4)  # float32


def test_step_safety_clips_a_generator_it_was_told_of(fit, dense_normalized_step):
    safety = StepSafety()
    module = Adversarial(safety)
    module.lr = 3.0

    fit(module, safety, max_epochs=1)

    assert {report.status for report in safety.last} == {"clipped"}
    before, after, inputs = module.steps[-1]
    assert dense_normalized_step(before, after, inputs) == pytest.approx(1.0, rel=1e-4)  # float32


def test_step_safety_leaves_a_gan_bitwise_alone_while_it_only_watches(fit):
    """The discriminator's BatchNorm is run again for the generator's step, and put back."""
    safety = StepSafety(action="monitor")
    guarded, plain = Adversarial(safety), Adversarial()

    guarded_metrics = fit(guarded, safety).callback_metrics
    metrics = fit(plain).callback_metrics

    assert float(guarded_metrics["generated_epoch"]) == float(metrics["generated_epoch"]) == 32
    states = guarded.state_dict(), plain.state_dict()
    assert all(map(torch.equal, states[0].values(), states[1].values()))


def test_step_safety_resumes_a_gan_bitwise(fit, tmp_path):
    def gan(safety):
        module = Adversarial(safety)
        module.lr = 3.0  # every step is clipped
        return module

    whole, first, second = StepSafety(), StepSafety(), StepSafety()
    uninterrupted, resumed = gan(whole), gan(second)
    fit(uninterrupted, whole, Seeded(), max_epochs=3)
    halted = fit(gan(first), first, Seeded(), max_epochs=1)
    halted.save_checkpoint(tmp_path / "first.ckpt")
    fit(resumed, second, Seeded(), max_epochs=3, ckpt_path=tmp_path / "first.ckpt")

    assert [report.step for report in second.last] == [5, 11]
    assert [r.normalized_step for r in second.last] == [r.normalized_step for r in whole.last]
    states = resumed.state_dict(), uninterrupted.state_dict()
    assert all(map(torch.equal, states[0].values(), states[1].values()))


class Seeded(Callback):
    """Seeds every batch, since a checkpoint of Lightning does not hold the random state."""

    def on_train_batch_start(self, trainer, *_):
        torch.manual_seed(trainer.global_step)


def test_step_safety_is_told_in_vain_while_nothing_is_trained():
    StepSafety().record(0, pytest.fail)


def as_two_classes(discriminator):
    head = nn.Linear(1, 2, bias=False)
    head.weight = nn.Parameter(torch.tensor([[1.0], [0.0]]))
    return nn.Sequential(discriminator, head)


def test_smallest_submodule_holds_every_use_of_a_tied_weight():
    model = nn.ModuleDict({"body": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["body"].weight
    outer = nn.ModuleDict({"model": model, "other": nn.Linear(2, 2)})

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert smallest_submodule(outer, [optimizer]) is model


def test_smallest_submodule_of_a_stranger_is_the_module_itself():
    model = nn.Linear(2, 2)

    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)

    assert smallest_submodule(model, [optimizer]) is model
