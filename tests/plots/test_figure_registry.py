"""Every figure of the report draws any run that has its data, and says in words what it shows."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from safestep.plots.figure_registry import FIGURES
from safestep.runlog.reader import read_run
from safestep.runlog.writer import RunLog

NAMES = [kind.name for kind in FIGURES]
STEP = {
    "normalized_step": 0.5, "radius": 2.0, "step_norm": 1.0, "scale": 1.0, "loss": 1.0,
    "learning_rate": 0.1, "effective_learning_rate": 0.1, "seconds": 0.01, "status": "ok",
    "estimator": "jvp", "radii": {"output": 2.0, "ffn": {"a": 3.0}},
}  # fmt: skip
WORKERS = {
    "loss": [1.0, 2.0], "grad_norm": [1.0, 1.5], "cosine_to_mean": [0.9, 0.8], "loss_std": 0.5,
    "grad_norm_cv": 0.2, "pairwise_cosine": 0.4, "noise_scale": 32.0, "outlier": 1,
}  # fmt: skip
STRANGE = {
    "one step": lambda step, value: value,
    "NaN": lambda step, value: "nan" if isinstance(value, float) and step % 2 else value,
    "infinite": lambda step, value: "inf" if isinstance(value, float) and step % 2 else value,
    "zero": lambda step, value: 0.0 if isinstance(value, float) else value,
    "five decades": lambda step, value: 10.0 ** (step - 3) if isinstance(value, float) else value,
}


def run_of(run_dir, change, *, num_steps):
    with RunLog(run_dir, {}, world_size=2) as log:
        for step in range(num_steps):
            for kind, record in (("step", STEP), ("workers", WORKERS)):
                changed = {name: change(step, value) for name, value in record.items()}
                log.write(kind, {"step": step, **changed})
            for micro, loss in enumerate((1.0, 2.0)):
                log.write("micro", {
                    "step": step, "micro": micro, "loss": [change(step, loss), 1.5],
                })  # fmt: skip
    return read_run(run_dir)


@pytest.mark.parametrize("kind", FIGURES, ids=NAMES)
@pytest.mark.parametrize("strange", STRANGE)
def test_figure_is_drawn_and_says_one_true_sentence(kind, strange, tmp_path):
    run = run_of(tmp_path, STRANGE[strange], num_steps=1 if strange == "one step" else 9)
    ax = Figure(layout="constrained").add_subplot()

    kind.plot(run, ax)

    ax.figure.draw_without_rendering()
    assert ax.get_title(loc="left")
    if kind.has_data(run):
        says = kind.says(run)
        assert says.endswith(".")
        assert says[0].isupper() or says.startswith("r ")  # r is a symbol
        assert "nan" not in says.lower().split()
        assert "nan%" not in says


@pytest.mark.parametrize("kind", FIGURES, ids=NAMES)
def test_figure_has_a_name_of_its_own_and_a_caption(kind):
    assert NAMES.count(kind.name) == 1
    assert kind.caption.endswith(".")


@pytest.mark.parametrize("kind", FIGURES, ids=NAMES)
def test_run_without_records_has_no_figure(kind, tmp_path):
    assert not kind.has_data(run_of(tmp_path, lambda step, value: value, num_steps=0))


def test_five_figures_come_first():
    first = [kind.name for kind in FIGURES if kind.is_first]

    assert sorted(first) == sorted(
        ["loss", "normalized_step", "learning_rate", "distribution", "workers_loss"]
    )
    assert np.all([first.index("loss") == 0, first.index("workers_loss") == 4])
