"""What the guard tells: the logits it found, the head that set the radius, what it doubts."""

import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

from safestep import SafeStep, StepReport, read_run
from safestep.guard.journal import Journal
from safestep.report import write_report
from safestep.runlog.columns import FIELDS
from safestep.workers.metrics import WorkerReport


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
    assert "output.calm, [6, 3], 33 % of rows ignored" in page.replace("\N{NO-BREAK SPACE}", " ")
    assert "at step 0, set by output.wild" in page


def test_logits_whose_temperature_nobody_showed_are_a_warning(tmp_path):
    """Soft labels at two temperatures: the graph shows that there is a division, not by what."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 6), torch.randn(8, 4)
    labels = softmax(3 * torch.randn(8, 6), -1)

    def loss():
        logits = model(inputs)
        return -(labels * (log_softmax(logits, -1) + log_softmax(logits / 4, -1))).sum(-1).mean()

    with pytest.warns(UserWarning, match="whether a temperature comes between"):
        report = one_step(model, loss)

    assert report.status == "ok"


def logged(tmp_path, **values):
    """Log `values` at the second of three steps; return the run."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SafeStep(optimizer, model, run_dir=tmp_path) as guard:
        for step in range(3):
            optimizer.zero_grad()
            cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            if step == 1:
                guard.log(**values)
            optimizer.step()
    return read_run(tmp_path)


RESERVED = [*StepReport.__dataclass_fields__, "kind", "run", "time", "head", "radii"]


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_name_is_refused_at_the_call(tmp_path, name):
    with pytest.raises(ValueError, match=rf"a name that is not the record's own, got `{name}`"):
        logged(tmp_path, **{name: 1.0})


@pytest.mark.parametrize(
    "value",
    [[1, 2, 3], (1,), {"a": 1}, torch.ones(2, 2), torch.ones(0), torch.tensor(1j), 1j, 10**400,
     object(), np.ones(3), print, 2**64 * 10**300, torch.ones(1, device="meta")],
    ids=lambda value: f"{type(value).__name__} {str(value)[:12]}",
)  # fmt: skip
@pytest.mark.parametrize("name", ["loss", "accuracy"])
def test_value_that_cannot_be_written_is_refused_at_the_call(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"expected `{name}` to be one number"):
        logged(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("value", "read"),
    [(2, 2.0), (True, 1.0), (0.5, 0.5), (torch.tensor(0.5), 0.5), (torch.tensor([[0.5]]), 0.5),
     (np.float32(0.5), 0.5), (np.array([0.5]), 0.5), (float("inf"), float("inf")), (1e308, 1e308),
     (2**64, 2.0**64), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5), (None, float("nan"))],
    ids=str,
)  # fmt: skip
def test_logged_number_is_in_the_record_of_its_step_alone(tmp_path, value, read):
    np.testing.assert_array_equal(logged(tmp_path, loss=value)["loss"], [np.nan, read, np.nan])


def test_logged_value_is_that_of_the_call_and_holds_no_graph(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SafeStep(optimizer, model, run_dir=tmp_path) as guard:
        loss = cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,)))
        loss.backward()
        value = loss.item()
        guard.log(loss=loss, tag="warm-up")
        loss.detach().zero_()
        optimizer.step()

    assert read_run(tmp_path)["loss"].tolist() == [value]
    assert read_run(tmp_path)["tag"].tolist() == ["warm-up"]


def warnings_of(texts):
    """Return how often a guard warns that is told these."""
    journal = Journal(None, {}, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in texts:
            journal.warn_once(text)
    return [str(warning.message) for warning in caught]


def test_errors_that_differ_in_a_number_are_one_warning():
    texts = [f"unmeasured: tensor at 0x7f{step:04x} of {step} elements" for step in range(100)]

    assert warnings_of(texts) == [f"SafeStep: {texts[0]}."]


def test_warnings_of_one_guard_come_to_an_end():
    caught = warnings_of("unmeasured: " + letter for letter in "abcdefghijklmnopqrstuvwxyz")

    assert len(caught) == 21
    assert "no more warnings of this guard" in caught[-1]


def test_every_field_of_a_report_has_a_type_where_logs_are_read():
    names = [*StepReport.__dataclass_fields__, *WorkerReport.__dataclass_fields__]

    others = ["loss", "events", "micro_loss", "micro_grad_norm"]  # records of their own, but loss
    assert [name for name in names if name not in FIELDS] == others
