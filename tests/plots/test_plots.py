"""Figures draw what the log holds, and say so where it holds nothing."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from safestep import plots
from safestep.plots.figure_registry import FIGURES
from safestep.plots.log_axis import make_log
from safestep.plots.loss import rank_correlation
from safestep.plots.rates import say_cost
from safestep.plots.style import COLORS
from safestep.runlog.reader import read_run
from safestep.runlog.series import change_pairs, removed_area, spans, step_series, step_share, thin
from safestep.runlog.writer import RunLog

STEP_PLOTS = [
    plots.plot_loss,
    plots.plot_safe_zone,
    plots.plot_normalized_step,
    plots.plot_learning_rate,
    plots.plot_distribution,
    plots.plot_prediction,
    plots.plot_loss_change,
    plots.plot_cost,
]
WORKER_PLOTS = [
    plots.plot_worker_heatmap,
    plots.plot_micro_batches,
    plots.plot_dispersion,
    plots.plot_consistency,
    plots.plot_noise_scale,
]


def new_axes():
    return Figure(layout="constrained").add_subplot()


def render(ax):
    ax.figure.draw_without_rendering()


def texts(ax):
    return [text.get_text() for text in ax.texts] + [ax.get_title(loc="left")]


def lines(ax, color):
    return [line.get_xydata() for line in ax.lines if line.get_color() == color]


def run_of(tmp_path, *records, kind="step"):
    with RunLog(tmp_path, {}) as log:
        for step, record in enumerate(records):
            log.write(kind, {"step": step, **record})
    return read_run(tmp_path)


@pytest.mark.parametrize("plot", STEP_PLOTS, ids=lambda plot: plot.__name__)
def test_step_plot_of_a_spiked_run_has_named_axes(plot, spiked_run):
    ax = plot(read_run(spiked_run), new_axes())

    render(ax)
    assert ax.get_title(loc="left")
    assert ax.get_xlabel()
    assert ax.get_ylabel() or plot is plots.plot_distribution  # its y axis names phases
    assert ax.lines


@pytest.mark.parametrize("plot", WORKER_PLOTS, ids=lambda plot: plot.__name__)
def test_worker_plot_has_named_axes(plot, worker_run):
    ax = plot(read_run(worker_run), new_axes())

    render(ax)
    assert ax.get_title(loc="left")
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel()


@pytest.mark.parametrize("plot", STEP_PLOTS + WORKER_PLOTS, ids=lambda plot: plot.__name__)
@pytest.mark.parametrize("records", [
    [],
    [{"normalized_step": 0.5, "radius": 2.0, "step_norm": 1.0, "scale": 1.0, "loss": 1.0}],
    [{}, {}, {}],
    [{"normalized_step": "nan", "radius": "nan", "step_norm": "nan", "scale": 0.0, "loss": "nan",
      "status": "skipped", "learning_rate": 0.1, "effective_learning_rate": 0.0}] * 3,
    [{"normalized_step": 0.0, "radius": "inf", "step_norm": 0.0, "scale": 1.0, "loss": 0.0,
      "status": "ok", "learning_rate": 0.0, "effective_learning_rate": 0.0}] * 3,
], ids=["empty", "one step", "no fields", "all skipped", "all zero"])  # fmt: skip
def test_plot_of_a_strange_run_is_drawn(plot, records, tmp_path):
    ax = plot(run_of(tmp_path, *records), new_axes())

    render(ax)


def test_plot_without_data_says_what_is_missing(tmp_path):
    run = run_of(tmp_path, {"normalized_step": 0.5})

    assert "the log holds no loss" in texts(plots.plot_loss(run, new_axes()))
    assert "the log holds no noise scale" in texts(plots.plot_noise_scale(run, new_axes()))


def test_plot_without_axes_makes_a_pyplot_figure(spiked_run):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")

    ax = plots.plot_loss(read_run(spiked_run))

    assert plt.gca() is ax
    plt.close(ax.figure)


def test_loss_plot_draws_the_loss_and_every_intervention(spiked_run):
    run = read_run(spiked_run)
    series = step_series(run)

    ax = plots.plot_loss(run, new_axes())

    (drawn,) = lines(ax, COLORS["loss"])
    np.testing.assert_array_equal(drawn, np.stack([run.steps["step"], run.steps["loss"]], axis=1))
    (ticks,) = lines(ax, COLORS["intervention"])
    assert 60 in ticks[:, 0]
    assert len(ticks) == series.intervened.sum()


@pytest.mark.parametrize(
    "plot", [plots.plot_normalized_step, plots.plot_distribution, plots.plot_prediction]
)
def test_plot_of_r_marks_the_radius(plot, spiked_run):
    ax = plot(read_run(spiked_run), new_axes())

    marks = [line for line in ax.lines if line.get_color() == COLORS["radius"]]
    values = [line.get_xdata() if plot != plots.plot_normalized_step else line.get_ydata()
              for line in marks]  # fmt: skip
    assert [list(value) for value in values] == [[1.0, 1.0]]
    assert "r = 1" in texts(ax)


def test_taken_steps_lie_at_the_radius_where_they_were_clipped(spiked_run):
    series = step_series(read_run(spiked_run))

    np.testing.assert_allclose(series.taken[series.clipped], 1.0, rtol=1e-4)
    np.testing.assert_array_equal(
        series.taken[~series.intervened], series.proposed[~series.intervened]
    )


def test_removed_area_is_the_share_of_the_learning_rates_sum(tmp_path):
    run = run_of(
        tmp_path,
        {"learning_rate": 1.0, "effective_learning_rate": 1.0, "status": "ok"},
        {"learning_rate": 3.0, "effective_learning_rate": 1.0, "status": "clipped"},
    )

    assert removed_area(step_series(run)) == 0.5
    says = next(kind.says for kind in FIGURES if kind.name == "learning_rate")
    assert says(run).endswith("; the guard lowered it at step 1, from 3 to 1.")


def test_many_steps_that_were_scaled_are_told_with_the_mean(tmp_path):
    rates = {"learning_rate": 2.0, "effective_learning_rate": 1.0, "status": "clipped"}
    says = next(kind.says for kind in FIGURES if kind.name == "learning_rate")

    assert says(run_of(tmp_path, *[rates] * 30)).endswith(
        "The learning rate was 2; the guard lowered it at 30 steps, by 50 % in the mean."
    )


def test_few_steps_that_were_scaled_are_told_with_the_one_lowered_most(tmp_path):
    calm = {"learning_rate": 1.0, "effective_learning_rate": 1.0, "status": "ok", "scale": 1.0}
    scaled = [
        {"learning_rate": 9.0, "effective_learning_rate": 9 * s, "status": "clipped", "scale": s}
        for s in (0.5, 0.1)
    ]
    says = next(kind.says for kind in FIGURES if kind.name == "learning_rate")

    text = says(run_of(tmp_path, *[calm] * 98, *scaled, {"status": "skipped", "scale": 0.0}))

    assert text.endswith(
        "lowered it at 2 steps, most at step 99, from 9 to 0.9, and did not take step 100."
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_rank_correlation_of_monotone_values_is_one(sign):
    x = np.random.default_rng(0).normal(size=50)

    assert rank_correlation(x, sign * np.exp(x)) == pytest.approx(sign)


def test_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200))
    ranks = [np.argsort(np.argsort(values)) for values in (x, x + y)]

    assert rank_correlation(x, x + y) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert math.isnan(rank_correlation(x[:1], y[:1]))


def test_rank_correlation_gives_ties_their_mean_rank_and_a_constant_none():
    """By hand: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4 have the correlation 4.5 / sqrt(4.5 * 5)."""
    x, y = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])

    assert rank_correlation(x, y) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation(np.ones(4), y))


@pytest.mark.parametrize("span", [(0.7, 1.4), (0.5, 30.0), (1e-7, 5e6), (1.0, 1e200)], ids=str)
def test_log_axis_has_numbers_that_do_not_overlap(span):
    ax = Figure(figsize=(5.0, 3.1), layout="constrained").add_subplot()
    ax.plot(span, span)
    for axis in ("x", "y"):
        make_log(ax, axis)

    render(ax)

    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        shown = [tick.label1 for tick in axis.get_major_ticks()
                 if tick.label1.get_text() and low <= tick.get_loc() <= high]  # fmt: skip
        assert 2 <= len(shown) <= 8
        boxes = [label.get_window_extent() for label in shown]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_joint_step_of_two_optimizers_adds_their_normalized_steps(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(2):
            for r, norm in ((0.25, 3.0), (0.5, 4.0)):
                log.write("step", {
                    "step": step, "normalized_step": r, "step_norm": norm, "scale": 1.0,
                    "radius": norm / r, "status": "clipped" if r == 0.5 and step else "ok",
                })  # fmt: skip

    series = step_series(read_run(tmp_path))

    assert series.step.tolist() == [0, 1]
    assert series.proposed.tolist() == [0.75, 0.75]
    assert series.step_norm.tolist() == [5.0, 5.0]
    np.testing.assert_allclose(series.radius, 5.0 / 0.75)
    assert series.clipped.tolist() == [False, True]


def test_share_of_the_step_leaves_pauses_out_and_counts_the_guards_slow_first_step(tmp_path):
    """By hand: 1 s and nine times 0.1 s of the guard; 0.3 s of the rest, one pause of an hour."""
    time, seconds = 0.0, [1.0, *[0.1] * 9]
    with RunLog(tmp_path, {}) as log:
        for step, cost in enumerate(seconds):
            time += cost + (3600.0 if step == 5 else 0.3)
            log.write("step", {"step": step, "seconds": cost, "time": time})

    mean, rest = 0.19, (8 * 0.3 + 3.0) / 9  # the pause counts as ten times the median
    assert step_share(read_run(tmp_path)) == pytest.approx(mean / (mean + rest))


def test_loss_of_steps_without_one_is_the_workers_mean(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(3):
            log.write("step", {"step": step, "normalized_step": 0.5})
        log.write("workers", {"step": 1, "loss": [1.0, 3.0]})

    np.testing.assert_array_equal(step_series(read_run(tmp_path)).loss, [math.nan, 2.0, math.nan])


def test_heatmap_marks_the_worker_that_stands_out(worker_run):
    run = read_run(worker_run)

    ax = plots.plot_worker_heatmap(run, new_axes(), quantity="loss")

    (marks,) = lines(ax, COLORS["intervention"])
    late = marks[marks[:, 0] >= 80]
    assert len(late) > 10
    assert set(late[:, 1]) == {3.0}


def test_heatmap_of_many_steps_keeps_the_value_farthest_from_the_others(tmp_path):
    losses = np.ones((5000, 4))
    losses[3333, 2] = 7.0
    run = run_of(tmp_path, *({"loss": row} for row in losses), kind="workers")

    ax = plots.plot_worker_heatmap(run, new_axes())

    shown = ax.collections[0].get_array()
    assert shown.shape == (4, 400)
    assert shown.max() == 7.0


def test_heatmap_of_an_unknown_quantity_is_an_error(worker_run):
    with pytest.raises(ValueError, match="expected `quantity` in"):
        plots.plot_worker_heatmap(read_run(worker_run), new_axes(), quantity="speed")


def test_ladder_draws_every_rung_relative_to_the_lowest():
    radii = {"bound": [1.0, 2.0], "certified": [2.0, 6.0], "exact": [4.0, 8.0]}

    ax = plots.plot_ladder(radii, new_axes())

    drawn = {line.get_label(): line.get_xdata().tolist() for line in ax.lines}
    assert drawn == {"bound": [1, 1], "certified": [2, 3], "exact": [4, 4]}
    render(ax)


@pytest.mark.parametrize("radii", [{}, {"bound": [1.0], "exact": [1.0, 2.0]}], ids=str)
def test_ladder_of_unequal_rungs_is_an_error(radii):
    with pytest.raises(ValueError, match="one radius a row for each rung"):
        plots.plot_ladder(radii, new_axes())


def test_thinning_keeps_extremes_ends_and_what_is_asked():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[[17, 50_000]] = 50, -50
    values[70_000:80_000] = np.nan
    keep = np.zeros(len(values), dtype=bool)
    keep[[71_234, 5]] = True

    indices = thin(values, keep=keep, max_points=500)

    assert len(indices) < 600
    assert {0, 5, 17, 50_000, 71_234, 99_999} <= set(indices.tolist())
    assert (np.diff(indices) > 0).all()


def test_thinning_leaves_a_short_series_whole():
    assert thin(np.arange(10.0)).tolist() == list(range(10))


def test_spans_join_neighbours_within_the_gap():
    mask = np.array([1, 0, 1, 1, 0, 0, 0, 1], dtype=bool)

    assert spans(mask) == [(0, 0), (2, 3), (7, 7)]
    assert spans(mask, max_gap=2) == [(0, 3), (7, 7)]
    assert spans(np.zeros(3, dtype=bool)) == []


def test_loss_change_pairs_leave_out_what_was_scaled_or_not_measured(tmp_path):
    measured = {"scale": 1.0, "divergence": 0.01, "loss_slope": -0.03}
    records = [
        measured | {"loss": 2.0},
        measured | {"loss": 1.9, "scale": 0.5},
        measured | {"loss": 1.8, "divergence": None},
        measured | {"loss": 1.7, "loss_slope": -0.05},
        measured | {"loss": 1.5},
    ]
    predicted, observed = change_pairs(step_series(run_of(tmp_path, *records)))

    assert predicted == pytest.approx([-0.02, -0.04])
    assert observed == pytest.approx([-0.1, -0.2])


def test_loss_change_says_means_and_their_agreement(tmp_path):
    slopes = np.linspace(-0.2, -0.02, 12)
    losses = 3 + np.cumsum([0, *slopes])
    records = [
        {"loss": loss, "scale": 1.0, "divergence": 0.01, "loss_slope": slope - 0.01}
        for loss, slope in zip(losses, [*slopes, 0], strict=True)
    ]
    run = run_of(tmp_path, *records)
    kind = next(kind for kind in FIGURES if kind.name == "loss_change")

    assert kind.has_data(run)
    assert kind.says(run) == (
        "Mean change of the loss over 12 measured steps: predicted -0.11, observed -0.11 nats; "
        "rank correlation 1.00."
    )
    ax = plots.plot_loss_change(run, new_axes())
    render(ax)
    assert "rank correlation 1.00" in texts(ax)


def test_micro_batches_are_drawn_as_the_mean_of_the_ranks(tmp_path):
    with RunLog(tmp_path, {}, world_size=2) as log:
        for step in range(5):
            for micro in range(3):
                log.write("micro", {"step": step, "micro": micro, "loss": [1.0, 1.0 + 2 * micro]})
    run = read_run(tmp_path)
    (kind,) = [each for each in FIGURES if each.name == "micro_batches"]

    ax = kind.plot(run, new_axes())

    render(ax)
    assert ax.collections[0].get_array().T.tolist() == [[1.0, 2.0, 3.0]] * 5
    assert kind.has_data(run)
    assert "micro-batch 0 has the lowest (1) and micro-batch 2 the highest (3)" in kind.says(run)


def test_one_long_step_among_many_is_seen_in_the_distribution(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(3000):
            log.write("step", {"step": step, "normalized_step": 127.0 if step == 1500 else 0.1})

    ax = plots.plot_distribution(read_run(tmp_path), new_axes())

    tops = [patch.get_data().values.max() for patch in ax.patches]
    bars = ax.patches[1].get_data().values + 1  # of the middle third, over its base
    assert len(tops) == 3
    assert (bars > 0).sum() == 2
    assert bars[bars > 0].min() >= 0.05


def test_cost_of_a_long_run_shows_means_of_stretches(tmp_path):
    """Nine of ten steps take 1 ms, one 11 ms: no line of extremes, but 2 ms all along."""
    with RunLog(tmp_path, {}) as log:
        for step in range(10_000):
            seconds = 0.011 if step % 10 == 0 else 0.001
            log.write("step", {"step": step, "normalized_step": 0.1, "seconds": seconds})

    ax = plots.plot_cost(read_run(tmp_path), new_axes())

    np.testing.assert_allclose(ax.lines[0].get_ydata(), 2.0)


def test_cost_is_told_with_what_it_makes_of_a_step(tmp_path):
    """Steps of 3 ms to which the guard adds 1 ms take 1.33 times as long."""
    with RunLog(tmp_path, {}) as log:
        for step in range(10):
            log.write("step", {"step": step, "normalized_step": 0.1, "seconds": 0.001,
                               "time": 100 + 0.004 * step})  # fmt: skip

    told = say_cost(read_run(tmp_path))

    assert told == (
        "the guard took 1 ms a step in the mean: steps of 3 ms without it took 1.33 times as long"
    )


@pytest.mark.parametrize(("num_examples", "unit"), [(1, "workers' batches"), (32, "examples")])
def test_noise_scale_is_in_examples_only_where_their_number_is_known(tmp_path, num_examples, unit):
    with RunLog(tmp_path, {"num_examples": num_examples}, world_size=4) as log:
        for step in range(5):
            log.write("workers", {"step": step, "noise_scale": 6.0})
    run = read_run(tmp_path)

    ax = plots.plot_noise_scale(run, new_axes())

    kind = next(kind for kind in FIGURES if kind.name == "noise_scale")
    assert f"larger than 6 {unit} would" in kind.says(run)
    assert ax.get_ylabel() == f"noise scale ({unit})"


def test_few_measured_steps_make_no_figure_of_predictions(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(9):
            log.write("step", {"step": step, "normalized_step": 0.1, "scale": 1.0, "loss": 1.0,
                               "divergence": 0.1, "loss_slope": -0.2})  # fmt: skip

    kind = next(kind for kind in FIGURES if kind.name == "loss_change")

    assert not kind.has_data(read_run(tmp_path))
