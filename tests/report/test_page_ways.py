"""What the page says of an estimator comes from the estimator's own entry."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from safestep.measure.estimator_registry import Estimator
from safestep.plots.ladder import plot_ladder
from safestep.plots.measured_how import how_measured
from safestep.plots.style import INK, LADDER_COLORS
from safestep.radius.bounds import RUNGS
from safestep.report.write import write_report
from safestep.runlog.reader import read_run
from safestep.runlog.writer import RunLog

from .test_report import Page


@pytest.mark.parametrize("estimator", Estimator, ids=lambda each: each.value)
def test_every_estimator_is_counted_and_explained_on_the_page(tmp_path, estimator):
    with RunLog(tmp_path, {}) as log:
        text = f"{estimator.value} (in detail)"
        log.write("step", {"step": 0, "normalized_step": 0.5, "estimator": text, "status": "ok"})

    page = Page(write_report([tmp_path], refresh_seconds=5)).words

    told = f"measured at 1 step ({estimator.way} 1)"
    if estimator is Estimator.PREDICTED:
        told = "predicted from earlier ones at 1"
    assert f"How r was found: {told}." in page
    assert estimator.meaning in page


def test_estimator_of_another_version_is_trusted_more_than_a_prediction(tmp_path):
    """A step of two optimizers counts as the least trusted of its records."""
    with RunLog(tmp_path, {}) as log:
        for step, texts in enumerate([("jvp", "cube"), ("cube", "predicted")]):
            for estimator in texts:
                log.write("step", {"step": step, "normalized_step": 0.5, "estimator": estimator})

    ways = how_measured(read_run(tmp_path))

    np.testing.assert_array_equal(ways["cube"], [True, False])
    np.testing.assert_array_equal(ways["predicted"], [False, True])


def test_every_rung_has_a_colour_of_its_own():
    radii = {rung: [1.0, 2.0] for rung in (*RUNGS, "exact")}
    ax = plot_ladder(radii, Figure().add_subplot())

    assert LADDER_COLORS.keys() == radii.keys()
    assert len({line.get_color() for line in ax.lines}) == len(radii)
    assert LADDER_COLORS["exact"] == INK
