"""What the guard tells: the logits it found, the head that set the radius, what it doubts."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

from safestep import SafeStep, read_run
from safestep.report import write_report


class TwoHeads(nn.Module):
    """A small head and one whose logits move much further."""

    def __init__(self):
        super().__init__()
        self.calm, self.wild = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, inputs):
        return {"calm": self.calm(inputs), "wild": self.wild(20 * inputs)}


def one_step(model, loss_of, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8)
    with SafeStep(optimizer, model, **options) as guard:
        loss_of().backward()
        optimizer.step()
        return guard.last


def test_run_log_says_which_logits_were_found_and_which_head_set_the_radius(tmp_path, caplog):
    torch.manual_seed(0)
    model, inputs = TwoHeads(), torch.randn(6, 4)
    targets = torch.tensor([0, 1, 2, 0, -100, -100])

    def loss_of():
        output = model(inputs)
        return cross_entropy(output["calm"], targets) + cross_entropy(output["wild"], targets)

    with caplog.at_level(logging.INFO, logger="safestep"):
        one_step(model, loss_of, run_dir=tmp_path)

    line = "logits: output.calm, [6, 3], 33 % of rows ignored; output.wild, [6, 5], 33 % of"
    assert line in caplog.text
    run = read_run(tmp_path)
    assert [event["name"] for event in run.events] == ["logits"]
    assert run.events[0]["message"].startswith(line)
    assert run.header["logits"] == run.events[0]["message"]
    assert run["head"][0] == "output.wild"
    page = write_report([tmp_path], refresh_seconds=5).read_text(encoding="utf-8")
    assert "output.calm, [6, 3], 33 % of rows ignored" in page
    assert "at step 0, set by output.wild" in page


def test_logits_whose_temperature_nobody_showed_are_a_warning(tmp_path):
    """A plain loop with soft labels: a temperature outside of the model would leave no mark."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 6), torch.randn(8, 4)
    labels = softmax(3 * torch.randn(8, 6), -1)

    with pytest.warns(UserWarning, match="whether a temperature comes between"):
        report = one_step(model, lambda: -(labels * log_softmax(model(inputs), -1)).sum(-1).mean())

    assert report.status == "ok"
