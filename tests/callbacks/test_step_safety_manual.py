"""StepSafety under manual optimization: training_step makes the optimizer steps itself."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
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

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8))
            self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 2))
        of_generator, of_discriminator = self.optimizers()
        pair = torch.cat([real, fake.detach()])
        is_fake = torch.arange(len(pair)) >= len(real)
        loss = functional.cross_entropy(self.discriminator(pair), is_fake.long())
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        if batch_idx % 2:
            loss = -self.discriminator(fake).log_softmax(1)[:, 0].mean()
            of_generator.zero_grad()
            self.manual_backward(loss)
            of_generator.step()

    def configure_optimizers(self):
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in parts]


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


def test_step_safety_leaves_manual_training_bitwise_alone(fit):
    safety = StepSafety(action="monitor")
    guarded, plain = Manual(num_optimizers=2), Manual(num_optimizers=2)

    fit(guarded, safety)
    fit(plain)

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
    run = read_run(tmp_path / "run")
    assert sorted(set(run.steps["optimizer"])) == [0, 1]
    assert list(run.steps["optimizer"]).count(1) == 8


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
