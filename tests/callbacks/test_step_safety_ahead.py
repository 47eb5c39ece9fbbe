"""StepSafety with copy=False: Lightning's closure is judged before the optimizer makes its step."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional

from safestep.callbacks import StepSafety


class Classifier(LightningModule):
    """Dropout and BatchNorm before a softmax."""

    def __init__(self, lr=0.1, dropout=0.2, spoiled=None):
        super().__init__()
        self.lr, self.spoiled = lr, spoiled
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.net = nn.Sequential(first, nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), last)

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * torch.nan if batch_idx == self.spoiled else loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]


class Watch(Callback):
    """Keeps network, batch and report of every step."""

    def __init__(self, safety):
        self.safety, self.steps = safety, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = copy.deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = copy.deepcopy(pl_module.net)
        self.steps.append((self.before, after, batch[0], self.safety.guards[0].last))


def assert_same_numbers(one, other):
    for left, right in zip(
        (one.lightning_module.state_dict(), one.optimizers[0].state_dict()),
        (other.lightning_module.state_dict(), other.optimizers[0].state_dict()),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=str,
)
def test_step_safety_without_a_copy_trains_bitwise_as_without_a_guard(fit, options):
    safety = StepSafety(action="monitor", copy=False)
    watch = Watch(safety)

    guarded = fit(Classifier(), safety, watch, **options)
    plain = fit(Classifier(), **options)

    assert {report.status for *_, report in watch.steps if report} == {"ok"}
    assert_same_numbers(guarded, plain)


@pytest.mark.parametrize("lr", [0.01, 10.0], ids=["short", "long"])
def test_step_safety_without_a_copy_applies_clipped_gradients_up_to_the_limit(
    fit, lr, dense_normalized_step
):
    safety = StepSafety(max_normalized_step=0.5, copy=False)
    watch = Watch(safety)

    trainer = fit(Classifier(lr, dropout=0.0), safety, watch, gradient_clip_val=0.01)

    for before, after, inputs, report in watch.steps:
        applied = dense_normalized_step(before, after, inputs)
        # float32 against float64
        assert applied == pytest.approx(min(0.5, report.normalized_step), rel=1e-3)
    assert watch.steps[0][3].status == ("ok" if lr < 1 else "clipped")
    assert trainer.optimizers[0].param_groups[0]["lr"] == lr


def test_step_safety_without_a_copy_lets_no_broken_gradient_through(fit):
    safety = StepSafety(copy=False)
    watch = Watch(safety)

    fit(Classifier(lr=0.01, spoiled=2), safety, watch, max_epochs=1)

    statuses = [report.status for *_, report in watch.steps]
    assert statuses == ["ok", "ok", "skipped", "ok"]
    before, after, *_ = watch.steps[2]
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)
