"""A loss that is NaN is told as lost, with the steps at which it was no number."""

import numpy as np
import pytest

from safestep.report.verdict import write_verdict
from safestep.runlog.reader import read_run
from safestep.runlog.writer import RunLog


def verdict_of(run_dir, losses):
    with RunLog(run_dir, {}) as log:
        for step, loss in enumerate(losses):
            loss = {} if loss is None else {"loss": loss}
            log.write("step", {"step": step, "normalized_step": 0.5, "status": "ok", **loss})
    verdict = write_verdict(read_run(run_dir))
    return verdict, " ".join([verdict.headline, *verdict.sentences])


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_run_whose_loss_was_never_finite_is_lost(tmp_path, loss):
    verdict, text = verdict_of(tmp_path, [loss] * 60)

    assert verdict.tone == "bad"
    assert verdict.headline == "Lost: the loss was never finite."
    assert "from step 0 on" in text
    assert "healthy" not in text


def test_run_that_logged_no_loss_is_not_lost(tmp_path):
    verdict, text = verdict_of(tmp_path, [None] * 60)

    assert verdict.headline.startswith("Healthy")
    assert "not a number" not in text


def test_steps_before_the_first_logged_loss_are_not_lost(tmp_path):
    verdict, _ = verdict_of(tmp_path, [None] * 30 + [1.0] * 30)

    assert verdict.headline.startswith("Healthy")


def test_steps_whose_loss_was_not_a_number_are_named(tmp_path):
    verdict, _ = verdict_of(tmp_path, [np.nan] * 30 + [1.0] * 30)

    assert verdict.tone == "warn"
    assert verdict.headline == "The loss was not a number at steps 0-29."


def test_loss_that_becomes_nan_is_not_called_infinite_or_its_last_level(tmp_path):
    verdict, text = verdict_of(tmp_path, [1.0] * 30 + [np.nan] * 30)

    assert verdict.headline.startswith("Lost: the loss is not finite after step 29")
    assert "not a number from step 30 on" in text
    assert "infinite" not in text
    assert "step 27" not in text
    assert "The loss went from 1 to 1." not in text
