"""WorkerConsistency in a real Trainer: accumulated batches, two ranks, logs, checkpoints."""

import numpy as np
import pytest
import torch
from helpers.scripts import run_script
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional

from safestep import read_run
from safestep.callbacks import StepSafety, WorkerConsistency


class Classifier(LightningModule):
    """A small network whose own gradient of every batch is kept, from a second graph."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
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
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reports(Callback):
    """Keeps the callback's reports."""

    def __init__(self, consistency):
        self.consistency, self.found = consistency, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.consistency.last not in self.found:
            self.found.append(self.consistency.last)


def fit_and_report(fit, module, **options):
    consistency = WorkerConsistency()
    reports = Reports(consistency)
    fit(module, consistency, reports, **options)
    return [report for report in reports.found if report]


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_accumulated_batches_are_workers_with_their_own_losses_and_gradients(fit, clip):
    module = Classifier()

    reports = fit_and_report(
        fit, module, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=clip
    )

    norms = np.linalg.norm(module.gradients, axis=1)
    np.testing.assert_allclose(
        [report.loss for report in reports], np.reshape(module.losses, (2, 2))
    )
    np.testing.assert_allclose(
        [report.grad_norm for report in reports], norms.reshape(2, 2), rtol=1e-5
    )


def test_a_loss_scaler_changes_no_number(fit):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = Classifier()

    reports = fit_and_report(
        fit, module, max_epochs=1, accumulate_grad_batches=4, plugins=precision
    )

    np.testing.assert_allclose(reports[0].loss, module.losses, rtol=1e-6)
    # The second graph is built under autocast too, of other roundings.
    norms = np.linalg.norm(module.gradients, axis=1)
    np.testing.assert_allclose(reports[0].grad_norm, norms, rtol=1e-2)


def test_a_short_last_step_has_fewer_workers(fit):
    reports = fit_and_report(fit, Classifier(), max_epochs=1, accumulate_grad_batches=3)

    assert [len(report.loss) for report in reports] == [3, 1]


def test_training_is_bitwise_unchanged(fit):
    bare, watched = Classifier(), Classifier()
    fit(bare, accumulate_grad_batches=2)
    fit(watched, WorkerConsistency(), accumulate_grad_batches=2)

    for one, other in zip(bare.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_metrics_reach_the_logger_and_the_run_log(fit, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = fit(Classifier(), WorkerConsistency(), accumulate_grad_batches=2, logger=logger)

    for name in ("loss_std", "loss_range", "grad_norm_std", "grad_norm_cv", "pairwise_cosine"):
        assert f"workers/{name}" in trainer.logged_metrics
    run = read_run(logger.log_dir)
    assert np.shape(run.workers["grad_norm"]) == (4, 2)


def test_both_callbacks_share_one_run_log(fit, tmp_path):
    class Plain(Classifier):
        def training_step(self, batch, batch_idx):
            inputs, classes = batch
            return functional.cross_entropy(self.net(inputs), classes)

    callbacks = StepSafety(run_dir=tmp_path), WorkerConsistency(run_dir=tmp_path)

    fit(Plain(), *callbacks, max_epochs=1, accumulate_grad_batches=2)

    run = read_run(tmp_path)
    assert len(run.steps["normalized_step"]) == len(run.workers["loss_std"]) == 2


def test_one_worker_is_warned_about_and_not_measured(fit):
    consistency = WorkerConsistency()

    with pytest.warns(UserWarning, match="has one worker; nothing is measured"):
        fit(Classifier(), consistency, max_epochs=1)

    assert consistency.last is None


def test_a_resumed_run_goes_on_from_the_step(fit, tmp_path):
    first = fit(Classifier(), WorkerConsistency(), max_epochs=1, accumulate_grad_batches=2)
    first.save_checkpoint(tmp_path / "end.ckpt")
    consistency = WorkerConsistency()

    options = {"max_epochs": 2, "accumulate_grad_batches": 2}
    fit(Classifier(), consistency, ckpt_path=tmp_path / "end.ckpt", **options)

    assert consistency.last.step == 3


def test_hooks_are_gone_after_training_and_after_an_exception(fit):
    class Fails(Classifier):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop here")

    consistency = WorkerConsistency()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(Fails(), consistency, accumulate_grad_batches=2)

    assert consistency.metrics is None


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_steps_are_measured_and_logged(fit, tmp_path, every):
    module, consistency = Classifier(), WorkerConsistency(every=every, run_dir=tmp_path)
    reports = Reports(consistency)

    fit(module, consistency, reports, accumulate_grad_batches=2, max_epochs=3)

    steps = list(range(0, 6, every))
    assert [report.step for report in reports.found if report] == steps
    run = read_run(tmp_path)
    assert list(run.workers["step"]) == steps
    expected = np.reshape(module.losses, (6, 2))[::every]
    np.testing.assert_allclose(run.workers["loss"], expected)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where both ranks of two runs left what they saw."""
    output = tmp_path_factory.mktemp("ranks")
    run_script("lightning_ranks.py", output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_two_ranks_of_a_trainer_equal_by_hand_gradients(ranks, every):
    """A real ddp_fork Trainer, gradient clipping and accumulation among its options."""
    folder = ranks / f"every{every}"
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]

    gradients = np.stack([rank["gradients"] for rank in found], axis=1)[::every]  # [steps, N, P]
    losses = np.stack([rank["losses"] for rank in found], axis=1)[::every]
    reports = found[0]["reports"]
    steps = list(range(0, 8, every))
    assert [report.step for report in reports] == steps
    norms = np.linalg.norm(gradients, axis=2)
    cosines = (gradients[:, 0] * gradients[:, 1]).sum(1) / norms.prod(1)
    np.testing.assert_allclose([report.loss for report in reports], losses, rtol=1e-6)
    np.testing.assert_allclose([report.grad_norm for report in reports], norms, rtol=1e-6)
    np.testing.assert_allclose([report.pairwise_cosine for report in reports], cosines, atol=1e-6)
    assert found[1]["reports"] == reports
    logged = read_run(folder).workers
    assert list(logged["step"]) == steps
    assert np.shape(logged["cosine_to_mean"]) == (len(steps), 2)
    micro = np.stack([rank["micro"] for rank in found], axis=-1)[::every]  # [steps, M, N]
    np.testing.assert_allclose([report.micro_loss for report in reports], micro, rtol=1e-6)
    columns = read_run(folder).micro
    np.testing.assert_allclose(columns["loss"], micro.reshape(-1, 2), rtol=1e-6)
    assert columns["step"].tolist() == np.repeat(steps, 2).tolist()
    assert columns["micro"].tolist() == [0, 1] * len(steps)
    assert found[0]["logged"]["workers/pairwise_cosine"] == pytest.approx(cosines[-1], abs=1e-6)


@pytest.mark.slow
def test_batches_that_fully_shard_accumulates_are_micro_batches_of_one_step(tmp_path):
    """Lightning lets fully_shard reduce each: a step is still the optimizer's."""
    run_script("sharded_trainer.py", tmp_path, 2, "consistency")
    found = [torch.load(tmp_path / f"consistency {rank}.pt", weights_only=False) for rank in (0, 1)]

    reports = found[0]["reports"]
    micro = np.stack([rank["losses"] for rank in found], axis=-1).reshape(-1, 2, 2)
    assert found[1]["reports"] == reports
    assert [report.step for report in reports] == [0, 1]
    np.testing.assert_allclose([report.micro_loss for report in reports], micro, rtol=1e-6)
    np.testing.assert_allclose([report.loss for report in reports], micro.mean(1), rtol=1e-6)
    assert np.isfinite([report.micro_grad_norm for report in reports]).all()
    np.testing.assert_allclose(
        [report.grad_norm for report in reports], [r.micro_grad_norm[-1] for r in reports]
    )
