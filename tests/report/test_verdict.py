"""The story of a run follows from its numbers."""

import numpy as np
import pytest

from safestep.plots.wording import number
from safestep.report.bands import upper_band
from safestep.report.evidence import gather
from safestep.report.regimes import REGIMES, name_regimes
from safestep.report.verdict import write_verdict
from safestep.runlog.reader import read_run
from safestep.runlog.series import step_series
from safestep.runlog.writer import RunLog


def story_of(run_dir):
    verdict = write_verdict(read_run(run_dir))
    return verdict, " ".join([verdict.headline, *verdict.sentences])


def log_steps(run_dir, losses, **columns):
    """Write one step a loss; other columns hold a value a step, or one for all."""
    with RunLog(run_dir, {"max_normalized_step": 1.0}) as log:
        for step, loss in enumerate(losses):
            fields = {name: v[step] if np.ndim(v) else v for name, v in columns.items()}
            fields = {"normalized_step": 0.5, "scale": 1.0, "status": "ok", **fields}
            log.write("step", {"step": step, "loss": loss, **fields})
    return run_dir


def at(step, value, *, length=200, otherwise):
    column = [otherwise] * length
    column[step] = value
    return column


def noisy_losses(length=200, seed=0):
    return 1.0 + 0.02 * np.random.default_rng(seed).normal(size=length)


def test_healthy_run_is_called_healthy(healthy_run):
    verdict, story = story_of(healthy_run)

    assert verdict.tone == "good"
    assert verdict.headline.startswith("Healthy: 120 steps, r <= 0.")
    assert verdict.headline.count("the loss fell from ") == 1
    assert "The loss went" not in story  # told once
    assert "Steps 0-119" not in story


def test_caught_spike_is_told_with_its_cause_and_outcome(spiked_run):
    verdict, story = story_of(spiked_run)
    series = step_series(read_run(spiked_run))
    place = np.flatnonzero(series.step == 60)[0]

    assert verdict.tone == "good"
    assert verdict.headline.startswith("Protected: the guard scaled down 1 of 120 steps (step 60: ")
    assert "Steps 0-59 inside the limit (r <= " in story
    assert "learning rate x10,000" in story
    assert number(float(series.proposed[place])) in story
    assert f"scaled by {number(float(series.scale[place]))}" in story
    assert "no rise of the loss beyond its noise (" in story


def test_spike_that_was_let_through_is_called_harm(lost_run):
    verdict, story = story_of(lost_run)

    assert verdict.tone == "bad"
    assert verdict.headline.startswith("Harmed: after step 60, where an r of ")
    assert "(learning rate x10,000) was let through, the loss rose from 0." in verdict.headline
    assert "Let through at step" in story
    assert "loss rose from" in story


def test_drifting_worker_is_named(worker_run):
    verdict, _story = story_of(worker_run)

    assert verdict.tone == "warn"
    assert verdict.headline.startswith("Worker 3 is off from step 80 on: its loss was ")
    assert verdict.headline.endswith(". Look at its data and its device.")


def test_worker_that_often_stands_out_is_named_without_an_event(tmp_path):
    with RunLog(tmp_path, {}, world_size=4) as log:
        for step in range(100):
            log.write("workers", {"step": step, "outlier": 2 if step >= 40 else None})

    _, story = story_of(tmp_path)

    assert "Worker 2 stood out from step 40 on, at 100 % of the measured steps." in story


def test_step_that_was_not_taken_is_told_with_its_reason(tmp_path):
    reason = "the gradient is not finite: head.weight"
    log_steps(
        tmp_path, noisy_losses(), reason=at(50, reason, otherwise=None),
        scale=at(50, 0.0, otherwise=1.0), normalized_step=at(50, "nan", otherwise=0.5),
        status=at(50, "skipped", otherwise="ok"),
    )  # fmt: skip

    _, story = story_of(tmp_path)

    told = "the gradient of head.weight is not finite"
    assert f"1 intervention at step 50: not taken ({told}); loss unaffected (" in story


@pytest.mark.parametrize("is_old", [False, True], ids=["a column", "in an older log's reason"])
def test_second_runs_are_told_once_and_not_with_each_step(tmp_path, is_old):
    cause = "the gradient is not finite: head.weight"
    told = "run again, its batch gives the same result bit for bit: the data is the cause"
    reason, losses = np.full(200, None, dtype=object), noisy_losses()
    reason[50:56] = reason[100] = f"{cause}; {told}" if is_old else cause
    losses[50:56] = np.nan
    is_touched = [each is not None for each in reason]
    columns = {"reason": list(reason), "status": list(np.where(is_touched, "skipped", "ok"))}
    if not is_old:
        columns["second_run"] = ["same" if touched else None for touched in is_touched]
    log_steps(tmp_path, losses, **columns, normalized_step=0.5)

    verdict, story = story_of(tmp_path)

    assert story.count("bit for bit") == 1
    assert "Run again, the batches of all 7 touched steps gave the same result" in story
    assert "7 of 200 steps (the gradient of head.weight is not finite); after" in verdict.headline
    assert verdict.headline.endswith("Look at the batches of steps 50-55 and 100.")
    assert "scaled" not in verdict.headline
    assert "run again" not in verdict.headline
    assert "loss was not finite until step 56, then 1 (1 before)" in story


@pytest.mark.parametrize(
    ("found", "old", "told"),
    [
        (
            "other: rank 1", "run again, its batch gives another result on rank 1: this machine",
            "Run again, the batch of step 50 gave another result on rank 1: this machine",
        ),
        (
            "unknown: it was gone", "its batch was not compared with a second run: it was gone",
            "The batch of step 50 was not compared with a second run: it was gone.",
        ),
        (
            "rounded", "run again, its batch gives the same result up to rounding: the data",
            "the batch of step 50 gave the same result up to rounding, so this machine is not",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_old", [False, True], ids=["a column", "in an older log's reason"])
def test_second_run_of_a_single_step_is_told_with_its_result(tmp_path, found, old, told, is_old):
    name, text = ("reason", old) if is_old else ("second_run", found)
    status = at(50, "clipped", otherwise="ok")
    log_steps(
        tmp_path, noisy_losses(), **{name: at(50, text, otherwise=None)}, status=status,
        normalized_step=at(50, 7.0, otherwise=0.5), scale=at(50, 0.1, otherwise=1.0),
    )  # fmt: skip

    assert told in story_of(tmp_path)[1]


def test_row_is_named_only_where_it_set_the_radius_of_most_steps(tmp_path):
    rows = ["row 3 set the radius"] * 2 + ["row 4 set the radius"]
    for name, reason in (("most", rows), ("half", [*rows, "row 5 set the radius"])):
        steps = len(reason)
        log_steps(tmp_path / name, np.ones(steps), reason=reason, status=["clipped"] * steps,
                  normalized_step=4.0, scale=0.25)  # fmt: skip

    stories = [story_of(tmp_path / name)[1] for name in ("most", "half")]

    assert ["set the radius" in story for story in stories] == [True, False]


def test_loss_of_a_run_scaled_throughout_is_said_to_have_fallen(tmp_path):
    log_steps(tmp_path, np.linspace(2, 1, 150), normalized_step=4.0, scale=0.25, status="clipped")

    _, story = story_of(tmp_path)

    assert "; loss 2 at first, 1.1" in story
    assert "unaffected" not in story


def test_loss_that_comes_back_is_told_with_the_step(tmp_path):
    losses = noisy_losses()
    losses[101:121] += 3
    log_steps(tmp_path, losses, normalized_step=at(100, 7.0, otherwise=0.5))

    verdict, story = story_of(tmp_path)

    assert verdict.tone == "bad"
    assert "r = 7; loss rose from 1 to 4.02, and was back at 1 by step 121" in story


def test_unmeasured_steps_are_told(tmp_path):
    log_steps(
        tmp_path, noisy_losses(), reason=at(3, "no kernel", otherwise=None),
        normalized_step=at(3, "nan", otherwise=0.5), status=at(3, "unmeasured", otherwise="ok"),
    )  # fmt: skip

    verdict, story = story_of(tmp_path)

    assert verdict.tone == "warn"
    assert "1 step could not be measured and passed unguarded (no kernel)." in story


def test_reason_of_unmeasured_steps_leaves_the_second_run_out(tmp_path):
    told = "the gradient is not finite: 0.weight; run again, its batch gives the same result"
    log_steps(tmp_path, noisy_losses(), status="unmeasured", normalized_step="nan", reason=told)

    verdict, story = story_of(tmp_path)

    assert "(the gradient of 0.weight is not finite)" in verdict.headline
    assert "unguarded (the gradient of 0.weight is not finite)." in story
    assert "run again" not in story.lower()


def test_run_that_is_scaled_all_along_is_told_its_learning_rate_is_too_high(tmp_path):
    log_steps(tmp_path, noisy_losses(), normalized_step=4.0, scale=0.25, status="clipped")

    verdict, _story = story_of(tmp_path)

    assert verdict.tone == "warn"
    assert verdict.headline == (
        "The learning rate is about 4 times too large; the guard scaled down 200 of 200 steps."
    )


def test_many_episodes_are_told_by_the_worst_and_counted(tmp_path):
    r = [0.5] * 2000
    for place, step in enumerate(range(100, 2000, 100)):
        r[step] = 2.0 + place
    log_steps(tmp_path, noisy_losses(2000), normalized_step=r)

    verdict, story = story_of(tmp_path)

    assert story.count("Let through at step") == 5
    assert "14 milder episodes besides, r <= 15." in story
    assert len(verdict.sentences) < 12


def test_steps_that_were_held_say_after_which(tmp_path):
    held = range(101, 117)
    is_touched = [100 <= step < 117 for step in range(200)]
    log_steps(
        tmp_path, noisy_losses(),
        status=["clipped" if touched else "ok" for touched in is_touched],
        normalized_step=[2.0 if touched else 0.5 for touched in is_touched],
        scale=[0.5 if touched else 1.0 for touched in is_touched],
        reason=[
            "held within the limit for 16 steps after step 100" if step in held
            else "the linearised loss would change by 1 nats" if step == 100 else None
            for step in range(200)
        ],
    )  # fmt: skip

    _, story = story_of(tmp_path)

    assert "scaled by 0.5, held within the limit for 16 steps after step 100;" in story


def test_loss_that_rises_inside_the_radius_is_no_healthy_run(tmp_path):
    log_steps(tmp_path, [*noisy_losses(100), *(noisy_losses(100) + 2)])

    verdict, story = story_of(tmp_path)

    assert verdict.tone == "warn"
    assert "yet the loss rose" in verdict.headline
    assert "above its usual range from step 100 on, at 10" in story


def test_loss_that_is_lost_is_told(tmp_path):
    log_steps(
        tmp_path, [*noisy_losses(100), *["nan"] * 100],
        normalized_step=at(99, 50.0, otherwise=0.5),
    )  # fmt: skip

    verdict, _story = story_of(tmp_path)

    assert verdict.tone == "bad"
    assert verdict.headline == (
        "Lost: the loss is not finite after step 99, where an r of 50 was let through. "
        "Go back to a checkpoint from before step 99."
    )


def test_learning_rate_that_jumped_at_one_step_is_told_with_that_step(tmp_path):
    """The spike is one step; r stays over the limit after it, at the usual rate."""
    rates = at(120, 3.0, otherwise=0.003)
    log_steps(
        tmp_path, [*noisy_losses(121), *(noisy_losses(79) + 6)], learning_rate=rates,
        normalized_step=[0.1] * 120 + [90.0] + [2.0] * 79,
    )  # fmt: skip

    _, story = story_of(tmp_path)

    assert "Let through at steps 120-199: learning rate x1,000 at step 120, r <= 90; " in story


def test_stretch_before_an_early_spike_is_not_judged_by_what_follows(tmp_path):
    losses = np.r_[noisy_losses(4), noisy_losses(196) + 20]
    log_steps(tmp_path, losses, normalized_step=at(3, 40.0, otherwise=0.1))

    verdict, story = story_of(tmp_path)

    assert "Steps 0-2 inside the limit (r <= 0.1)." in story
    assert verdict.headline.startswith("Harmed: after step 3, where an r of 40 was let through")


def test_worst_of_many_steps_is_named_where_the_guard_protected(tmp_path):
    r = [0.5] * 300
    r[100], r[200] = 3.0, 8.0
    log_steps(
        tmp_path, noisy_losses(300), normalized_step=r, scale=[min(1.0, 1 / x) for x in r],
        status=["clipped" if x > 1 else "ok" for x in r],
    )  # fmt: skip

    assert "2 of 300 steps (the longest at step 200: r = 8); " in story_of(tmp_path)[0].headline


@pytest.mark.parametrize("kind", ["step", "workers", "none"])
def test_run_of_one_record_has_a_verdict(tmp_path, kind):
    with RunLog(tmp_path, {}) as log:
        if kind != "none":
            log.write(kind, {"step": 0})

    verdict, _ = story_of(tmp_path)

    assert verdict.headline


def test_regimes_partition_the_steps(tmp_path):
    """A long step is harmful, controlled or unknown by the loss that followed."""
    losses = list(noisy_losses(400))
    losses[201:] = [loss + 1 for loss in losses[201:]]
    r = [0.5] * 400
    r[100], r[200], r[399] = 3.0, 3.0, 3.0
    log_steps(tmp_path, losses, normalized_step=r)
    run = read_run(tmp_path)

    masks = name_regimes(run, gather(run))

    assert list(masks) == list(REGIMES)
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
    assert np.flatnonzero(masks["controlled"]).tolist() == [100]
    assert np.flatnonzero(masks["harmful"]).tolist() == [200]
    assert np.flatnonzero(masks["unknown"]).tolist() == [399]  # nothing followed


def test_step_that_shakes_the_gradients_alone_is_unsettled(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(100):
            norm = 10.0 if 61 <= step < 70 else 1.0
            log.write("workers", {"step": step, "loss": [1.0, 1.0], "grad_norm": [norm, norm]})
            r = 2.0 if step == 60 else 0.5
            log.write("step", {"step": step, "normalized_step": r, "scale": 1.0, "status": "ok"})
    run = read_run(tmp_path)

    assert np.flatnonzero(name_regimes(run, gather(run))["unsettled"]).tolist() == [60]


def test_band_follows_the_best_level_and_not_the_later_one():
    values = np.concatenate([np.linspace(3, 1, 200), np.full(200, 5.0)])

    edges = upper_band(values)

    assert np.isinf(edges[0])
    assert (edges[50:200] > values[50:200]).all()
    assert (edges[201:] < 3).all()


def test_band_of_a_long_healthy_run_is_hardly_ever_left():
    values = noisy_losses(200_000)

    edges = upper_band(values, min_width=0.0)

    assert (values > edges)[100:].mean() < 1e-3
