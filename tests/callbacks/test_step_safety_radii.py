"""The callback logs radii inside a module, from the same re-run of its training step."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from safestep import read_run
from safestep.callbacks import StepSafety


class Attending(LightningModule):
    """Attention over single numbers, a ReLU, classes from the mean."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(1, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.classify = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        x = self.lift(inputs.unsqueeze(-1))
        logits = self.classify(self.attend(x, x, x)[0]).mean(1)
        # The loss's own softmax is no attention.
        return -logits.softmax(-1).gather(1, targets.unsqueeze(1)).log().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_radii_inside_the_module_are_logged_by_layer(fit, tmp_path):
    guard = StepSafety(radii=("output", "attention", "ffn"), run_dir=tmp_path)

    fit(Attending(), guard, max_epochs=1)

    columns = read_run(tmp_path).steps
    assert len(columns["radii"]) == 4
    for radii, bound in zip(columns["radii"], columns["radius"], strict=True):
        assert radii["output"] == pytest.approx(bound, rel=1e-5)
        assert radii["attention"].keys() == {"attend"}
        assert radii["ffn"].keys() == {"classify.1"}
        assert 0 < radii["ffn"]["classify.1"] < math.inf
    assert set(columns["binding"]) <= {"output", "attention", "ffn"}


def test_radii_inside_the_module_are_not_logged_by_default(fit, tmp_path):
    fit(Attending(), StepSafety(run_dir=tmp_path), max_epochs=1)

    assert "radii" not in read_run(tmp_path).steps
