"""Figures of runs whose r is the same at every step, or whose loss ends before the run does."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from safestep import plots
from safestep.plots.figure_registry import FIGURES
from safestep.runlog.reader import read_run
from safestep.runlog.writer import RunLog


def says(name, run):
    return next(kind.says for kind in FIGURES if kind.name == name)(run)


@pytest.fixture
def lost(tmp_path):
    """A loss that is no number from step 30 on, and no r from there on."""
    with RunLog(tmp_path, {}) as log:
        for step in range(200):
            found = {"normalized_step": 0.5, "radius": 2.0, "step_norm": 1.0, "loss": 1.0}
            lost = {"normalized_step": np.nan, "loss": np.nan, "status": "unmeasured"}
            log.write("step", {"step": step, **(found if step < 30 else lost)})
    return read_run(tmp_path)


@pytest.mark.parametrize(
    "plot", [plots.plot_loss, plots.plot_normalized_step, plots.plot_safe_zone],
    ids=lambda plot: plot.__name__,
)  # fmt: skip
def test_step_axis_of_a_lost_run_reaches_its_last_step(plot, lost):
    ax = plot(lost, Figure().add_subplot())

    assert ax.get_xlim()[1] >= 199


def test_last_finite_loss_of_a_lost_run_is_not_told_as_its_end(lost):
    assert says("loss", lost) == (
        "The loss went from 1 at step 0 to 1 at step 29 and is not finite after it; the guard "
        "changed no step."
    )


def test_phase_without_r_is_not_said_to_be_left_alone(lost):
    ax = plots.plot_distribution(lost, Figure().add_subplot())

    assert [text.get_text() for text in ax.texts][:3] == ["0 steps\nscaled", "no r", "no r"]


def test_steps_scaled_to_the_limit_have_one_r_whatever_their_rounding(tmp_path):
    rng = np.random.default_rng(0)
    with RunLog(tmp_path, {}) as log:
        for step in range(100):
            scale = (1 + 1e-7 * rng.normal()) / 5
            fields = {"normalized_step": 5.0, "scale": scale, "status": "clipped"}
            log.write("step", {"step": step, "loss": 1 + rng.random(), **fields})
    run = read_run(tmp_path)

    assert says("prediction", run) == (
        "r or the loss change was the same at all 99 steps: nothing to compare."
    )
    plots.plot_prediction(run, Figure().add_subplot()).figure.draw_without_rendering()


def test_rate_that_was_never_lowered_has_one_label(healthy_run):
    ax = plots.plot_learning_rate(read_run(healthy_run), Figure().add_subplot())

    assert [text.get_text() for text in ax.texts] == ["set and\ntaken"]
