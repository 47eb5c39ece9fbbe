"""The figure of radii inside a model draws what the log holds, and says where that is nothing."""

import math

import pytest
from matplotlib.figure import Figure

from safestep import read_run
from safestep.plots.radii import plot_binding_radius
from safestep.runlog.inner_series import binding_shares, least_radii
from safestep.runlog.writer import RunLog


def test_the_figure_draws_the_least_of_each_kind_and_says_what_binds(tmp_path):
    with RunLog(tmp_path, {}) as log:
        for step in range(4):
            layers = {"blocks.0": 0.5 + step, "blocks.1": 3.5 - step}
            log.write("step", {"step": step, "radii": {"output": 1.0, "ffn": layers}})

    ax = plot_binding_radius(read_run(tmp_path), Figure().add_subplot())

    ax.figure.draw_without_rendering()
    output, ffn = (line.get_xydata().tolist() for line in ax.lines)
    assert output == [[0, 1.0], [1, 1.0], [2, 1.0], [3, 1.0]]
    assert ffn == [[0, 0.5], [1, 1.5], [2, 1.5], [3, 0.5]]
    assert "ffn 50 %, output 50 %" in [text.get_text() for text in ax.texts]
    assert ax.get_ylabel() == "radius (parameter distance)"


@pytest.mark.parametrize(
    "radii",
    [
        None,
        "wide",
        [1.0],
        {},
        {"output": None},
        {"output": "<b>", "ffn": {"a": {}}},
        {"output": -1.0},
        {"output": math.inf, "ffn": {}},
        {"output": math.nan},
    ],
    ids=str,
)
def test_the_figure_of_a_log_without_usable_radii_says_so(radii, tmp_path):
    with RunLog(tmp_path, {}) as log:
        log.write("step", {"step": 0, "radii": radii})

    ax = plot_binding_radius(read_run(tmp_path), Figure().add_subplot())

    ax.figure.draw_without_rendering()
    assert [text.get_text() for text in ax.texts] == ["the log holds no radii inside the model"]


def test_steps_without_radii_leave_a_gap_not_a_share(tmp_path):
    with RunLog(tmp_path, {}) as log:
        log.write("step", {"step": 0, "radii": {"output": 1.0, "ffn": {"a": "inf"}}})
        log.write("step", {"step": 1})
        log.write("step", {"step": 2, "radii": {"output": 3.0, "ffn": {"a": 2.0, "b": 5.0}}})
        log.write("step", {"step": 2, "optimizer": 1, "radii": {"output": 4.0}})

    steps, radii = least_radii(read_run(tmp_path))

    assert steps.tolist() == [0, 2]
    assert radii["output"].tolist() == [1.0, 3.0]
    assert binding_shares(radii) == {"output": 0.5, "ffn": 0.5}
