"""The first screen of the page names what is wrong with a run, and what to change."""

import re

import numpy as np
import pytest

from safestep.report.verdict import write_verdict
from safestep.report.write import write_report
from safestep.runlog.reader import read_run
from safestep.runlog.writer import RunLog

from .test_report import Page

# What a reader has to find in the headline of each run of real training.
EXPECTED = {
    "healthy_run": r"^Healthy: 120 steps, r <= 0\.\d+, none touched; the loss fell from [\d.]+ to "
    r"[\d.]+\.$",
    "spiked_run": r"^Protected: the guard scaled down 1 of 120 steps \(step 60: r = \d+, learning "
    r"rate x10,000\); .* Look at what raised the learning rate at step 60\.$",
    "hot_run": r"^The learning rate \(3\) is about [\d.]+ times too large: 0\.\d+ would have "
    r"stayed under the limit at 95 % of the steps; the guard scaled down 120 of 120 steps\.$",
    "cold_run": r"^The learning rate \(1e-06\) could be larger: r was [\d.e-]+ or less at 99 % of "
    r"the steps, far below the limit of 1; the loss (fell( only)?|did not fall beyond its noise) "
    r"\(?from [\d.]+ to [\d.]+\)?\. Try 1e-05 first; r then tells whether to go on\.$",
    "lost_run": r"^Harmed: after step 60, where an r of \d+ \(learning rate x10,000\) was let "
    r"through, the loss rose from 0\..* Go back to a checkpoint from before step 60 and use "
    r"action=\"clip\"\.$",
    "broken_run": r"^Protected: the guard did not take 1 of 120 steps \(.*not finite"
    r".* Look at the batch of step 70\.$",
    "worker_run": r"^Worker 3 is off from step 80 on: its loss was 2\.\d+, that of the 3 "
    r"others 0\.\d+ \(medians of 40 steps\)\. Look at its data and its device\.$",
}
TONES = {"healthy_run": "good", "spiked_run": "good", "broken_run": "good", "lost_run": "bad"}


@pytest.mark.parametrize("name", EXPECTED)
def test_headline_names_what_is_wrong(name, request):
    run_dir = request.getfixturevalue(name)

    verdict = write_verdict(read_run(run_dir))

    assert re.search(EXPECTED[name], verdict.headline), verdict.headline
    assert verdict.tone == TONES.get(name, "warn")


def test_headline_stands_before_the_figures(hot_run, tmp_path):
    page = Page(write_report([hot_run], tmp_path, refresh_seconds=5)).words

    assert "How r was found: measured at 120 steps (exact 120)." in page
    assert (
        page.index("times too large") < page.index("How r was found") < page.index("More figures")
    )


def test_suggested_learning_rate_keeps_the_steps_under_the_limit(hot_run):
    """The length of a step, and with it r, is proportional to the learning rate."""
    run = read_run(hot_run)
    (text,) = re.findall(r"too large: ([\d.]+) would", write_verdict(run).headline)

    r = run["normalized_step"] * float(text) / run["learning_rate"]

    assert np.mean(r <= 1.01) >= 0.95
    assert np.quantile(r, 0.95) > 0.9


def test_replica_that_differs_is_named_with_its_step(tmp_path):
    with RunLog(tmp_path, {}, world_size=4) as log:
        for step in range(60):
            log.write("step", {"step": step, "normalized_step": 0.5, "scale": 1.0, "loss": 1.0})
        message = "rank 2: update norm differs from the other replicas since step 40 (by 50 %)"
        log.write("event", {"name": "replica", "step": 44, "since": 40, "rank": 2,
                            "message": message})  # fmt: skip

    headline = write_verdict(read_run(tmp_path)).headline

    assert headline == (
        "Replica 2 drifted from step 40 on (update norm differs from the other replicas (by 50 %))."
        " Restart it from a checkpoint."
    )


def test_loss_that_stays_up_although_the_guard_stepped_in_is_no_protection(tmp_path):
    losses = np.r_[np.full(150, 0.17), np.full(150, 0.33)]
    losses += 0.01 * np.random.default_rng(0).normal(size=300)
    with RunLog(tmp_path, {"max_normalized_step": 1.0}) as log:
        for step, loss in enumerate(losses):
            is_held = 149 <= step < 200
            log.write("step", {
                "step": step, "loss": loss, "normalized_step": 80.0 if is_held else 0.5,
                "scale": 1 / 80 if is_held else 1.0, "status": "clipped" if is_held else "ok",
            })  # fmt: skip

    verdict = write_verdict(read_run(tmp_path))

    assert verdict.tone == "bad"
    assert verdict.headline.startswith("The guard scaled down 51 of 300 steps, yet after step 149")
    assert re.search(
        r"the loss rose from 0\.1[67]\d* to 0\.3[34]\d* and stayed up \(0\.3[23]\d* by step 299\)",
        verdict.headline,
    )


def test_loss_that_rose_before_it_was_lost_is_told_with_both(tmp_path):
    losses = np.r_[np.full(100, 0.1), np.full(80, 3.3), np.full(60, np.nan)]
    with RunLog(tmp_path, {"max_normalized_step": 1.0}) as log:
        for step, loss in enumerate(losses):
            r = 248.0 if step == 99 else 0.5
            log.write("step", {"step": step, "loss": loss, "normalized_step": r, "scale": 1.0})

    headline = write_verdict(read_run(tmp_path)).headline

    assert headline == (
        "Lost: the loss is not finite after step 179. Harmed: after step 99, where an r of 248 was "
        "let through, the loss rose from 0.1 to 3.3 and was not finite from step 180 on. "
        "Go back to a checkpoint from before step 99."
    )
