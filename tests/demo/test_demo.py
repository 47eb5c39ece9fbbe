"""The demo: what it trains, what it reports, and that its options are checked."""

import json
import math
import sys
from argparse import ArgumentParser
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from safestep import StepReport, read_run
from safestep.cli import main
from safestep.demo import tasks
from safestep.demo.command import NO_SPIKE, add_arguments, plan, run
from safestep.demo.experiment import PROTECTIONS, Outcome, Spike, train
from safestep.demo.figure import draw_spike, save_figures
from safestep.demo.jobs import Job, makespan
from safestep.demo.models import CharacterGPT
from safestep.demo.summary import caption, summarize, summary_tables
from safestep.demo.tasks import DigitsTask, TextTask

HELD = Spike(10_000.0, is_held=True)


class ShortDigits(DigitsTask):
    num_steps = 24
    spike_step = 15


class ShortText(TextTask):
    num_steps = 3
    spike_step = 1


@pytest.fixture(scope="module")
def outcomes():
    task = ShortDigits("mlp")
    jobs = [Job("mlp", NO_SPIKE, "plain", 0), *(Job("mlp", HELD, way, 0) for way in PROTECTIONS)]
    return {job: train(task, job.spike, PROTECTIONS[job.protection], seed=0) for job in jobs}


def parse(*options):
    parser = ArgumentParser(prog="safestep demo")
    add_arguments(parser)
    return parser.parse_args(options)


def final_accuracy(outcome):
    return outcome.accuracies[-1]["test"]


def largest_taken(outcome):
    return max(report.normalized_step * report.scale for report in outcome.reports)


# --- data and models


def test_digits_test_set_is_the_first_fifth_of_the_rows():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)

    (train_images, train_labels), (images, test_labels) = tasks.load_digits()

    assert len(images) == 1797 // 5
    assert len(train_images) == 1797 - 1797 // 5
    np.testing.assert_array_equal(images.numpy() * 16, values[:359])
    np.testing.assert_array_equal(test_labels.numpy(), labels[:359])
    np.testing.assert_array_equal(train_labels.numpy(), labels[359:])


@pytest.mark.parametrize("architecture", tasks.ARCHITECTURES)
def test_a_model_gives_ten_logits_for_each_image_and_depends_on_the_seed_only(architecture):
    task = DigitsTask(architecture)
    images, _ = task.batch(seed=0, step=0)
    state = torch.get_rng_state()

    first, again, other = task.model(0), task.model(0), task.model(1)

    assert torch.equal(torch.get_rng_state(), state)
    assert first(images[:3]).shape == (3, 10)
    assert torch.equal(first(images[:3]), again(images[:3]))
    assert not torch.equal(first(images[:3]), other(images[:3]))


def test_gpt_sees_no_later_character():
    torch.manual_seed(0)
    model = CharacterGPT(7, context=8, width=16, layers=2, heads=2)
    characters = torch.randint(7, (2, 8))
    changed = characters.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 7

    before, after = model(characters), model(changed)

    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_text_targets_are_the_characters_that_follow():
    task = TextTask()

    inputs, targets = task.batch(seed=0, step=5)

    assert inputs.shape == targets.shape == (16, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, task.batch(seed=0, step=5)[0])
    assert not torch.equal(inputs, task.batch(seed=0, step=6)[0])


def test_text_learning_rate_warms_up_and_ends_near_a_tenth_of_its_peak():
    rates = [TextTask().learning_rate(step) for step in range(300)]

    assert rates[0] == pytest.approx(1e-3 / 30)
    assert max(rates) == rates[29] == pytest.approx(1e-3)
    assert rates[165] == pytest.approx(0.55e-3)  # half of the cosine
    assert rates[-1] == pytest.approx(1e-4, rel=1e-2)


def test_accuracy_of_batchnorm_is_given_by_both_statistics_and_changes_neither():
    task = DigitsTask("cnn")
    model = task.model(0)
    model(task.batch(0, 0)[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = tasks.load_digits()[1]

    accuracy = task.test_accuracy(model)

    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for key, is_training in (("running", False), ("test", True)):
        hits = model.train(is_training)(images).argmax(1).numpy() == labels.numpy()
        assert accuracy[key] == pytest.approx(100 * hits.mean())


def test_accuracy_without_batchnorm_is_one_number():
    task = DigitsTask("mlp")

    assert task.test_accuracy(task.model(0)).keys() == {"test"}


# --- the experiment


@pytest.mark.parametrize(
    ("spike", "factors"),
    [
        (Spike(10.0, is_held=True), [1, 10, 10]),
        (Spike(10.0, is_held=False), [1, 10, 1]),
        (Spike(1.0, is_held=True), [1, 1, 1]),
    ],
    ids=["held", "single", "none"],
)
def test_spike_multiplies_the_learning_rate(spike, factors):
    assert [spike.factor(since) for since in (-1, 0, 1)] == factors


def test_plain_run_is_bitwise_a_run_without_safestep(outcomes):
    task = ShortDigits("mlp")
    model = task.model(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.015)
    images, labels = task.batch(0, 0)
    losses = []
    for step in range(task.num_steps):
        if step == task.spike_step:
            optimizer.param_groups[0]["lr"] = 0.015 * HELD.severity
        loss = nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert outcomes[Job("mlp", HELD, "plain", 0)].losses == losses


@pytest.mark.parametrize("way", ["plain", "clip"])
def test_a_held_spike_destroys_the_run_without_safestep(outcomes, way):
    outcome = outcomes[Job("mlp", HELD, way, 0)]

    assert final_accuracy(outcome) < 30
    assert largest_taken(outcome) > 100


@pytest.mark.parametrize("way", ["bound", "certified"])
def test_safestep_carries_the_run_through_a_held_spike(outcomes, way):
    outcome = outcomes[Job("mlp", HELD, way, 0)]

    assert final_accuracy(outcome) > final_accuracy(outcomes[Job("mlp", NO_SPIKE, "plain", 0)]) - 3
    assert min(accuracy["test"] for accuracy in outcome.accuracies[15:]) > 90
    assert largest_taken(outcome) <= 1 + 1e-9


def test_run_log_holds_the_losses(tmp_path):
    task = ShortDigits("mlp")

    outcome = train(task, NO_SPIKE, PROTECTIONS["bound"], seed=0, run_dir=tmp_path)

    steps = read_run(tmp_path).steps
    np.testing.assert_array_equal(steps["loss"], outcome.losses)
    assert steps["status"].tolist() == [report.status for report in outcome.reports]


def test_guarded_gpt_clips_its_gradient_and_the_step_at_the_spike():
    spike = Spike(1000.0, is_held=False)

    outcome = train(ShortText(), spike, PROTECTIONS["certified"], seed=0)

    assert [report.status for report in outcome.reports] == ["ok", "clipped", "ok"]
    assert outcome.reports[1].learning_rate == pytest.approx(1000 * 2e-3 / 30)
    assert math.isfinite(outcome.losses[-1])


# --- the summary and the figure


def report(step, r, scale, status):
    return StepReport(
        step, normalized_step=r, radius=1.0, step_norm=r, spread=math.pi, scale=scale,
        learning_rate=1.0, effective_learning_rate=scale, estimator="jvp", status=status,
        seconds=0.0, bottleneck=0,
    )  # fmt: skip


def test_summary_agrees_with_values_by_hand():
    reports = [
        report(0, 0.5, 1.0, "ok"),
        report(1, 4.0, 0.25, "clipped"),
        report(2, math.nan, 0.0, "skipped"),
    ]
    accuracies = [{"test": 50.0}, {"test": 40.0}, {"test": 90.0}]

    summary = summarize([Outcome([3.0, 2.0, 1.0], accuracies, reports)], spike_step=1)

    assert summary.accuracy == 90.0
    assert summary.lowest_accuracy == 40.0
    assert math.isnan(summary.running_accuracy)
    assert summary.final_loss == 2.0
    assert summary.steps_clipped == 2
    assert summary.largest_proposed == 4.0
    assert summary.largest_taken == 1.0


def test_summary_is_the_median_over_seeds():
    runs = [
        Outcome([0.0], [{"test": accuracy}], [report(0, 1.0, 1.0, "ok")])
        for accuracy in (10.0, 95.0, 96.0)
    ]

    assert summarize(runs, spike_step=0).accuracy == 95.0


def test_table_leaves_out_columns_that_have_no_values(outcomes):
    (table,) = summary_tables(outcomes)

    assert table.title == "MLP + LayerNorm"
    assert "stats\n%" not in [column.header for column in table.columns]
    assert [cell for cell in table.columns[0].cells if not cell.startswith("  ")] == [
        "[bold]no spike", "[bold]x10,000 held",
    ]  # fmt: skip


def test_caption_explains_the_columns_that_are_there_alone(outcomes):
    text = caption(outcomes)

    assert "BatchNorm" not in text
    assert "seeds" not in text  # there is one
    assert all(word in text for word in ("test:", "lowest:", "final loss:", "clipped:", "r:"))


def test_table_fits_a_hundred_columns(outcomes):
    console = Console(width=100, record=True, file=StringIO())

    console.print(*summary_tables(outcomes))

    assert max(map(len, console.export_text().splitlines())) <= 100
    assert "..." not in console.export_text()


def test_time_left_is_that_of_the_worker_that_is_done_last():
    assert makespan([4.0, 1.0, 1.0, 1.0], workers=2) == 4.0
    assert makespan([1.0, 1.0, 1.0, 4.0], workers=2) == 5.0


def test_figure_explains_its_lines_without_a_caption(outcomes):
    figure = draw_spike(outcomes, HELD)

    words = " ".join(text.get_text() for ax in figure.axes for text in ax.texts)
    for phrase in ("radius: bound", "radius: certified", "dotted: proposed", "chance", "limit"):
        assert phrase in words


def test_figures_are_written_as_png(outcomes, tmp_path):
    paths = save_figures(outcomes, tmp_path)

    assert paths == [tmp_path / "x10000-held.png"]
    for path in (*paths, tmp_path / "x10000-held-compact.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_figure_draws_the_accuracies_that_were_measured(outcomes):
    figure = draw_spike(outcomes, HELD, size="compact")

    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    for way in PROTECTIONS:
        accuracies = [a["test"] for a in outcomes[Job("mlp", HELD, way, 0)].accuracies]
        assert any(len(y) == len(accuracies) and np.allclose(y, accuracies) for y in drawn), way


# --- the command line


def test_default_plan_is_one_plain_run_without_a_spike_and_four_with_it():
    jobs = plan(parse())

    assert jobs[:5] == [
        Job("transformer", NO_SPIKE, "plain", 0),
        *(Job("transformer", HELD, way, 0) for way in PROTECTIONS),
    ]
    assert {job.task for job in jobs} == {"transformer", "mlp"}
    assert len(jobs) == 10


def test_full_plan_has_every_severity_and_five_seeds_and_three_for_batchnorm():
    jobs = plan(parse("--full"))

    spikes = 1 + 2 * 4  # none; held and single, four severities
    assert len(jobs) == len(set(jobs)) == spikes * 4 * (5 + 5 + 3)


def test_options_narrow_the_full_plan():
    jobs = plan(
        parse("--full", "--architecture", "mlp", "--severity", "10", "--seeds", "2", "--single")
    )

    assert {job.spike for job in jobs} == {NO_SPIKE, Spike(10.0, is_held=False)}
    assert {job.task for job in jobs} == {"mlp"}
    assert {job.seed for job in jobs} == {0, 1}


def test_text_plan_is_one_step_at_a_thousand_times_the_learning_rate():
    spikes = {job.spike for job in plan(parse("--task", "text"))}

    assert spikes == {NO_SPIKE, Spike(1000.0, is_held=False)}


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (["--architecture", "resnet"], "transformer"),
        (["--task", "images"], "digits"),
        (["--severity", "-3"], "a factor of 1 or more"),
        (["--severity", "nan"], "a factor of 1 or more"),
        (["--severity", "big"], "a factor of 1 or more"),
        (["--seeds", "0"], "a whole number of 1 or more"),
        (["--held", "--single"], "not allowed with"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_with_what_is_allowed(options, allowed, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*options)

    assert allowed in capsys.readouterr().err


def test_an_architecture_for_the_text_is_refused_in_one_line(capsys, tmp_path):
    options = ["--task", "text", "--architecture", "mlp", "--output", str(tmp_path)]

    assert main(["demo", *options]) == 2

    error = capsys.readouterr().err
    assert "expected no `--architecture` with `--task text`" in error
    assert error.count("\n") == 1


def test_a_folder_with_something_in_it_is_refused(capsys, tmp_path):
    (tmp_path / "run.jsonl").touch()

    assert main(["demo", "--output", str(tmp_path)]) == 2

    assert "expected `--output` to be a new or an empty folder" in capsys.readouterr().err


def test_missing_scikit_learn_is_told_in_one_line(capsys, tmp_path, monkeypatch):
    tasks.load_digits.cache_clear()
    tasks.make_task.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as import finds it when not installed

    assert main(["demo", "--output", str(tmp_path)]) == 2

    error = capsys.readouterr().err
    assert "pip install safestep[demo]" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_demo_leaves_logs_and_figures_and_prints_where_they_are(capsys, tmp_path):
    assert run(parse("--architecture", "mlp", "--output", str(tmp_path / "out"))) == 0

    printed = capsys.readouterr().out
    assert str(tmp_path / "out" / "x10000-held.png") in printed
    logs = sorted((tmp_path / "out").rglob("run.jsonl"))
    assert len(logs) == 5
    assert all(log.read_text().count('"kind": "step"') == 200 for log in logs)
    assert json.loads(logs[0].read_text().splitlines()[-1])["step"] == 199
    for way in ("safestep bound", "safestep certified"):
        row = next(line for line in printed.splitlines() if line.strip().startswith(way))
        accuracy = float(row.split()[2])
        assert accuracy > 93
