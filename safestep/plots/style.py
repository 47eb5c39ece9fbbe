"""How figures look: one colour per quantity, and the few marks that all of them share."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from safestep.radius.bounds import RUNGS

# After Okabe and Ito's colours for the colour-blind, some darkened: each has a contrast of 3 or
# more with a white page. INK and PAPER stand for the page's own text and background.
INK, PAPER = "#1f2320", "#fefeff"
COLORS = {
    "loss": INK,
    "normalized_step": "#0077bb",
    "radius": "#009673",
    "step_norm": "#aa4499",
    "learning_rate": "#b87a00",
    "intervention": "#d9480f",
    "seconds": "#6b7785",
    "grad_norm": "#7a68c8",
    "cosine": "#0b8a92",
    "noise_scale": "#a6611a",
}
_BY_RUNG = (COLORS["radius"], COLORS["learning_rate"], COLORS["grad_norm"], "#0077bb", "#aa4499")
# From the sure and small to the true and large; a rung beyond the colours has the text's.
LADDER_COLORS = {**dict(zip(RUNGS, _BY_RUNG, strict=False)), "exact": INK}
SERIES_COLORS = tuple(sorted({*COLORS.values(), *LADDER_COLORS.values()} - {INK}))
MAX_MARKS = 3000  # more are drawn as pixels, not as vectors


def make_axes(ax: Axes | None, title: str, ylabel: str, xlabel: str = "step") -> Axes:
    """Return the axes, or new ones in a pyplot figure, titled and labelled.

    Args:
        ax: Axes to draw on, or None.
        title: What the figure shows.
        ylabel: Quantity and unit.
        xlabel: Quantity and unit.

    Returns:
        The axes.
    """
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    ax.set_title(title, loc="left", color=INK)
    ax.set_xlabel(xlabel, color=INK)
    ax.set_ylabel(ylabel, color=INK)
    ax.tick_params(colors=INK, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.grid(alpha=0.15, color=INK)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)
    if xlabel == "step":
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.patch.set_alpha(0)
    return ax


def show_whole_run(ax: Axes, steps: np.ndarray) -> None:
    """Let the step axis reach over all steps, also those that have nothing to draw.

    Args:
        ax: The axes.
        steps: Step numbers of the run, in rising order. Shape ``[T]``.
    """
    low, high = ax.get_xlim()
    margin = 0.01 * (steps[-1] - steps[0])
    ax.set_xlim(min(low, steps[0] - margin), max(high, steps[-1] + margin))


def say(ax: Axes, text: str) -> Axes:
    """Write a sentence on axes that have nothing to show.

    Args:
        ax: The axes.
        text: Why they are empty.

    Returns:
        The axes.
    """
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=INK)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def mark_limit(ax: Axes, axis: str = "y") -> None:
    """Draw the line r = 1, where the step is as long as the radius.

    Args:
        ax: Axes with r on one axis.
        axis: The axis that carries r.
    """
    draw = ax.axhline if axis == "y" else ax.axvline
    draw(1.0, color=COLORS["radius"], linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
    if axis == "x":
        ax.annotate(
            "r = 1", (1.0, 1.0), xycoords=ax.get_xaxis_transform(), xytext=(-3, -3), ha="right",
            va="top", textcoords="offset points", color=COLORS["radius"], path_effects=halo(),
        )  # fmt: skip


def mark_steps(ax: Axes, steps: np.ndarray, marker: str, text: str) -> None:
    """Mark steps along the upper edge, and say above it what the marks are.

    Args:
        ax: Axes with steps on x.
        steps: Step numbers. Shape ``[K]``; without any, nothing is drawn.
        marker: Marker of matplotlib.
        text: What the marks are.
    """
    if not len(steps):
        return
    ax.plot(
        steps, np.full(len(steps), 0.98), marker, color=COLORS["intervention"], markersize=8,
        transform=ax.get_xaxis_transform(), clip_on=False, rasterized=len(steps) > MAX_MARKS,
    )  # fmt: skip
    note(ax, text)


def note(ax: Axes, text: str, color: str = COLORS["intervention"], *, below: bool = False) -> None:
    """Write a line over the upper right corner, or under the lower one beside a long title.

    Args:
        ax: The axes.
        text: The line.
        color: Its colour; a note about interventions has theirs.
        below: Whether it stands at the height of the axis's name.
    """
    place, offset = ((1.0, 0.0), -32) if below else ((1.0, 1.0), 7)
    ax.annotate(
        text, place, xycoords="axes fraction", xytext=(0, offset), textcoords="offset points",
        ha="right", color=color, annotation_clip=False,
    )  # fmt: skip


def dots(ax: Axes, x: np.ndarray, y: np.ndarray, quantity: str, size: float = 4) -> None:
    """Draw dots in a quantity's colour, as pixels where they are too many for vectors.

    Args:
        ax: The axes.
        x: Places. Shape ``[K]``.
        y: Places. Shape ``[K]``.
        quantity: A key of ``COLORS``.
        size: Diameter in points.
    """
    color = COLORS[quantity]
    ax.plot(x, y, ".", color=color, markersize=size, rasterized=len(x) > MAX_MARKS)


def line_by_trust(
    ax: Axes, x: np.ndarray, y: np.ndarray, is_predicted: np.ndarray, color: str
) -> None:
    """Draw a line, bold where its values were measured and pale where they were predicted.

    Args:
        ax: The axes.
        x: Places. Shape ``[K]``.
        y: Values. Shape ``[K]``.
        is_predicted: Which of them were predicted. Shape ``[K]``.
        color: Colour of the line.
    """
    if not is_predicted.any():
        ax.plot(x, y, color=color, linewidth=1.1)
        return
    ax.plot(x, y, color=color, linewidth=1, alpha=0.65)
    measured = ~is_predicted
    ax.plot(
        x[measured], y[measured], ".", color=color, markersize=3,
        rasterized=measured.sum() > MAX_MARKS,
    )  # fmt: skip


def label_ends(ax: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Name lines at the right edge of the axes, where they end, without overlaps.

    Args:
        ax: The axes, with all data drawn.
        labels: For each line the y at which it ends, its name and its colour.
    """
    ax.autoscale_view()
    ends = [y if np.isfinite(y) else ax.get_ylim()[1] for y, _, _ in labels]
    points = ax.transData.transform([(ax.get_xlim()[0], end) for end in ends])
    heights = ax.transAxes.inverted().transform(points)[:, 1].clip(0, 1)
    for (_, text, color), height in zip(labels, _spread_out(heights, labels), strict=True):
        ax.annotate(
            text, (1.0, height), xycoords="axes fraction", xytext=(4, 0), color=color,
            textcoords="offset points", va="center", annotation_clip=False,
        )  # fmt: skip


def _spread_out(heights: np.ndarray, labels: list[tuple[float, str, str]]) -> np.ndarray:
    """Return the heights moved apart, up first, then down from the upper edge. Shape ``[L]``."""
    half = np.array([0.04 * (1 + text.count("\n")) for _, text, _ in labels])
    order = np.argsort(heights, kind="stable")
    moved = np.maximum(heights, half - 0.04)  # above the numbers of the step axis
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + half[below] + half[above])
    moved[order[-1]] = min(moved[order[-1]], 1.0)
    for above, below in pairwise(order[::-1]):
        moved[below] = min(moved[below], moved[above] - half[below] - half[above])
    return moved


def halo() -> list[patheffects.AbstractPathEffect]:
    """Return an outline in the page's colour, for text over data."""
    return [patheffects.withStroke(linewidth=3, foreground=PAPER)]


def last_finite(values: np.ndarray) -> float:
    """Return the last finite value, or NaN.

    Args:
        values: Any values. Shape ``[T]``.

    Returns:
        The value.
    """
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")
