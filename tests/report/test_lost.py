"""A loss that is NaN is told as lost, with the steps at which it was no number."""

import numpy as np
import pytest

from safestep.report.verdict import write_verdict
from safestep.runlog.reader import read_run
from safestep.runlog.series import drawable
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
    assert verdict.headline == (
        "Lost: the loss was never finite. Look at the first batch and at the initial weights."
    )
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
    assert verdict.headline == (
        "The loss was not a number at steps 0-29. Look at the batch of step 0."
    )


def test_loss_that_becomes_nan_is_not_called_infinite_or_its_last_level(tmp_path):
    verdict, text = verdict_of(tmp_path, [1.0] * 30 + [np.nan] * 30)

    assert verdict.headline == (
        "Lost: the loss is not finite after step 29. Go back to a checkpoint from before step 29; "
        "look at the batch of step 30."
    )
    assert "not a number from step 30 on" in text
    assert "infinite" not in text
    assert "step 27" not in text
    assert "The loss went from 1 to 1." not in text


def test_lost_run_that_was_only_watched_is_told_once_and_sent_to_the_guard(tmp_path):
    """The steps after the loss have no r; that is no finding of its own."""
    reason = "the gradient is not finite: head.weight"
    with RunLog(tmp_path, {"action": "monitor"}) as log:
        for step in range(60):
            found = {"loss": 1.0, "normalized_step": 0.5, "status": "ok"}
            lost = {"loss": np.nan, "status": "unmeasured", "reason": reason}
            log.write("step", {"step": step, **(found if step < 30 else lost)})

    assert write_verdict(read_run(tmp_path)).headline == (
        "Lost: the loss is not finite after step 29. Go back to a checkpoint from before step 29 "
        'and use action="clip"; look at the batch of step 30.'
    )


def test_run_whose_lost_steps_were_not_taken_keeps_its_weights(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(60):
            lost = {"loss": np.nan, "status": "skipped", "reason": "the loss is not finite"}
            log.write("step", {"step": step, **(lost if step >= 50 else {"loss": 1.0})})

    headline = write_verdict(read_run(tmp_path)).headline

    assert "The weights are still those of step 49: look at the batches from step 50 on" in headline
    assert "checkpoint" not in headline


@pytest.mark.parametrize("loss", [1e308, 1.7e308])
def test_finite_loss_at_the_end_of_float64_is_not_lost(tmp_path, loss):
    with RunLog(tmp_path, {}) as log:
        for step in range(60):
            log.write("step", {"step": step, "normalized_step": 0.5, "loss": loss})

    verdict = write_verdict(drawable(read_run(tmp_path)))

    assert verdict.headline.startswith("Healthy: 60 steps")
    assert "(from 1e+100 or more to 1e+100 or more)" in verdict.headline
