"""Draw the report's figures, and turn them into files and into SVG for the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safestep.plots.figure_registry import FigureKind
from safestep.plots.log_axis import make_log
from safestep.plots.style import INK, PAPER, SERIES_COLORS
from safestep.report.files import replace_file
from safestep.runlog.reader import Run

_SIZE = (5.0, 3.1)  # inches: text stays readable where a phone shows it 360 pixels wide
_RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "path.simplify": True,
}


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
        save_as = partial(
            figure.savefig, format=suffix[1:], dpi=150, facecolor="white", metadata=metadata
        )
        replace_file(stem.with_suffix(suffix), save_as)


def to_svg(figure: Figure, salt: str) -> Markup:
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
    return Markup(markup)


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
