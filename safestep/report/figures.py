"""The figures of a report, what each says, and how they become files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safestep import plots
from safestep.plots.style import INK, PAPER, SERIES_COLORS, make_log
from safestep.report import descriptions
from safestep.runlog.inner_series import least_radii
from safestep.runlog.reader import Run
from safestep.runlog.series import scalar, step_series

_SIZE = (5.0, 3.1)  # inches: text stays readable where a phone shows it 360 pixels wide
_RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "path.simplify": True,
}


@dataclass(frozen=True, slots=True)
class FigureKind:
    """One figure of the report.

    Attributes:
        name: Stem of its files.
        caption: How to read it.
        plot: Draws a run on axes.
        describe: Tells the facts of a run in words.
        has_data: Whether a run has what it shows.
    """

    name: str
    caption: str
    plot: Callable[[Run, Axes], Axes]
    describe: Callable[[Run], str]
    has_data: Callable[[Run], bool]


def _has_step(field: str) -> Callable[[Run], bool]:
    return lambda run: bool(np.isfinite(getattr(step_series(run), field)).any())


def _has_prediction(run: Run) -> bool:
    return bool(np.isfinite(step_series(run).loss).sum() > 1) and _has_step("proposed")(run)


def _has_radii(run: Run) -> bool:
    return bool(least_radii(run)[1])


def _has_worker(name: str) -> Callable[[Run], bool]:
    return lambda run: bool(np.isfinite(scalar(run, name)).any())


def _has_workers(name: str) -> Callable[[Run], bool]:
    def has(run: Run) -> bool:
        values = run.workers.get(name)
        return values is not None and values.ndim == 2 and bool(np.isfinite(values).any())

    return has


FIGURES = (
    FigureKind(
        "loss",
        "The training loss. Ticks at the upper edge are steps that the guard scaled or left out.",
        plots.plot_loss, descriptions.describe_loss, _has_step("loss"),
    ),
    FigureKind(
        "normalized_step",
        "r is the length of the proposed step over the radius. Up to r = 1 the local expansion of "
        "the loss converges at the step; over it there is no such promise.",
        plots.plot_normalized_step, descriptions.describe_normalized_step, _has_step("proposed"),
    ),
    FigureKind(
        "safe_zone",
        "The shaded zone is safe: there the step is shorter than the radius.",
        plots.plot_safe_zone, descriptions.describe_safe_zone, _has_step("radius"),
    ),
    FigureKind(
        "learning_rate",
        "Dashed: the optimizer's learning rate. Solid: what the step taken amounts to.",
        plots.plot_learning_rate, descriptions.describe_learning_rate, _has_step("learning_rate"),
    ),
    FigureKind(
        "distribution",
        "How often which r was proposed, in each third of the run.",
        plots.plot_distribution, descriptions.describe_distribution, _has_step("proposed"),
    ),
    FigureKind(
        "prediction",
        "Does r predict? Each dot is a step: its r, and by how much the loss changed until the "
        "next. The line is the median of each tenth of the steps.",
        plots.plot_prediction, descriptions.describe_prediction, _has_prediction,
    ),
    FigureKind(
        "binding_radius",
        "The radius of the output's softmax, of attention's, and where ReLU-like units switch. The "
        "lowest binds, but the guard decides on the output's alone.",
        plots.plot_binding_radius, descriptions.describe_binding_radius, _has_radii,
    ),
    FigureKind(
        "cost",
        "Time that the guard took at each step.",
        plots.plot_cost, descriptions.describe_cost, _has_step("seconds"),
    ),
    *(
        FigureKind(
            f"workers_{quantity}",
            f"One row a worker: {unit}. A cross marks a worker that stands out at a step.",
            partial(plots.plot_worker_heatmap, quantity=quantity),
            partial(descriptions.describe_heatmap, quantity=quantity),
            _has_workers(quantity),
        )
        for quantity, unit in plots.HEATMAP_QUANTITIES.items()
    ),
    FigureKind(
        "dispersion",
        "How far the workers lie apart, relative to their mean. Bold: the trend.",
        plots.plot_dispersion, descriptions.describe_dispersion, _has_worker("loss_std"),
    ),
    FigureKind(
        "consistency",
        "How well the workers' gradients agree in direction: 1 is agreement, 0 is none.",
        plots.plot_consistency, descriptions.describe_consistency,
        _has_worker("pairwise_cosine"),
    ),
    FigureKind(
        "noise_scale",
        "The batch size at which gradient and noise are of one size. Larger batches than this "
        "gain little.",
        plots.plot_noise_scale, descriptions.describe_noise_scale,
        _has_worker("noise_scale"),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Shared:
    """Scales and limits that hold the data of several runs."""

    log_axes: list[Literal["x", "y"]]
    xlim: tuple[float, float]
    ylim: tuple[float, float]


def draw(kind: FigureKind, runs: Sequence[Run]) -> list[Figure | None]:
    """Return a figure a run, None for a run without the data; axes are the same for all.

    Args:
        kind: The figure.
        runs: The runs to compare.

    Returns:
        The figures, in the order of the runs.
    """
    with mpl.rc_context(_RC):
        figures = [_draw_one(kind, run) if kind.has_data(run) else None for run in runs]
        drawn = [figure.axes[0] for figure in figures if figure is not None]
        if len(drawn) < 2:
            return figures
        shared = _shared_axes(drawn)
        return [_draw_one(kind, run, shared) if kind.has_data(run) else None for run in runs]


def save(figure: Figure, stem: Path) -> None:
    """Write a figure as PNG and PDF.

    Args:
        figure: The figure.
        stem: Path without suffix.
    """
    for suffix in (".png", ".pdf"):
        metadata = {"Software": None} if suffix == ".png" else {"CreationDate": None}
        figure.savefig(stem.with_suffix(suffix), dpi=150, facecolor="white", metadata=metadata)


def to_svg(figure: Figure, salt: str) -> str:
    """Return a figure as an ``<svg>`` element in the colours of the page around it.

    Args:
        figure: The figure.
        salt: Makes the ids of one page's figures differ.

    Returns:
        Markup, which holds no text of the log.
    """
    buffer = StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", dpi=150, facecolor="none", metadata={"Date": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :].replace("<svg ", '<svg aria-hidden="true" ', 1)
    markup = markup.replace(INK, "currentColor").replace(PAPER, "var(--page)")
    for color in SERIES_COLORS:
        markup = markup.replace(color, f"var(--c{color[1:]})")
    return markup


def _draw_one(kind: FigureKind, run: Run, shared: _Shared | None = None) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    if shared:
        for axis in shared.log_axes:
            make_log(axes, axis)
        axes.set(xlim=shared.xlim, ylim=shared.ylim)
    kind.plot(run, axes)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # found once, not again for each format
    return figure


def _shared_axes(drawn: Sequence[Axes]) -> _Shared:
    is_log = any(axes.get_yscale() == "log" for axes in drawn)
    lows, highs = zip(*(axes.get_ylim() for axes in drawn), strict=True)
    low = min(low for low in lows if low > 0 or not is_log)
    lefts, rights = zip(*(axes.get_xlim() for axes in drawn), strict=True)
    log_axes: list[Literal["x", "y"]] = ["y"] if is_log else []
    if drawn[0].get_xscale() == "log":
        log_axes.append("x")
    return _Shared(log_axes, (min(lefts), max(rights)), (low, max(highs)))
