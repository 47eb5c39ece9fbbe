"""The steps of a run as figures."""

import numpy as np
from matplotlib.axes import Axes

from safestep.plots.style import (
    COLORS,
    INK,
    dots,
    label_ends,
    last_finite,
    make_axes,
    make_log,
    mark_limit,
    mark_steps,
    note,
    say,
    use_log_scale,
)
from safestep.runlog.reader import Run
from safestep.runlog.series import StepSeries, loss_ratios, removed_area, step_series, thin

PHASES = ("early", "middle", "late")


def plot_loss(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the training loss, with a tick at the upper edge for each step the guard touched.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "Loss and interventions", "training loss (nats)")
    if not np.isfinite(series.loss).any():
        return say(ax, "the log holds no loss")
    at = thin(series.loss, keep=series.intervened)
    ax.plot(series.step[at], series.loss[at], color=COLORS["loss"], linewidth=1)
    use_log_scale(ax, series.loss)
    mark_steps(ax, series.step[series.intervened], "|", _touched(series))
    return ax


def plot_safe_zone(run: Run, ax: Axes | None = None) -> Axes:
    """Draw step distance against radius over time; the safe zone lies under the radius.

    The proposed step is the line, the step taken a dot where the guard touched it.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.

    Reference:
        "Ghosts of Softmax", arXiv:2603.13552, Fig. 6.
    """
    series = step_series(run)
    ax = make_axes(ax, "Step distance and radius", "parameter distance")
    if not (np.isfinite(series.radius) & np.isfinite(series.step_norm)).any():
        return say(ax, "no step was measured")
    at = thin(series.radius, series.step_norm, keep=series.intervened)
    step, radius = series.step[at], series.radius[at]
    distance = _positive(series.step_norm)[at]
    ax.plot(step, radius, color=COLORS["radius"], linewidth=1.2)
    ax.plot(step, distance, color=COLORS["step_norm"], linewidth=1.2)
    shown = [values[values > 0] for values in (radius, distance)]
    use_log_scale(ax, *shown, max_depth=1e-3)
    bottom = ax.get_ylim()[0] if ax.get_yscale() == "log" else 0.0
    ceiling = np.where(np.isposinf(radius), ax.get_ylim()[1], radius)
    ax.fill_between(step, bottom, ceiling, color=COLORS["radius"], alpha=0.13, linewidth=0)
    ax.set_ylim(bottom=bottom)
    clipped = series.clipped
    if clipped.any():
        taken = (series.step_norm * series.scale)[clipped]
        dots(ax, series.step[clipped], taken, "intervention")
        note(ax, "dots: taken")
    label_ends(ax, [
        (last_finite(radius), "radius", COLORS["radius"]),
        (last_finite(distance), "proposed\nstep", COLORS["step_norm"]),
    ])  # fmt: skip
    return ax


def plot_normalized_step(run: Run, ax: Axes | None = None) -> Axes:
    """Draw r, the proposed step over its radius, with the line r = 1.

    Steps that the guard scaled have a dot at the r proposed and one at the r taken; those it did
    not take have a cross at the upper edge.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "Normalized step", "r = step distance / radius")
    r = _positive(series.proposed)
    if not np.isfinite(r).any():
        return say(ax, "no step was measured")
    at = thin(r, keep=series.intervened)
    ax.plot(series.step[at], r[at], color=COLORS["normalized_step"], linewidth=1)
    clipped = series.clipped
    dots(ax, series.step[clipped], r[clipped], "intervention")
    dots(ax, series.step[clipped], series.taken[clipped], "normalized_step", size=3)
    mark_steps(ax, series.step[series.skipped], "x", "x: step not taken")
    mark_limit(ax)
    use_log_scale(ax, r, np.ones(1), ratio=10, max_depth=1e-3)
    ends = [(1.0, "r = 1", COLORS["radius"])]
    ends.append((last_finite(r), "r", COLORS["normalized_step"]))
    label_ends(ax, ends)
    return ax


def plot_learning_rate(run: Run, ax: Axes | None = None) -> Axes:
    """Draw base and effective learning rate, and how much of their area the guard removed.

    removed = 1 - sum of effective learning rates / sum of learning rates.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "Learning rate", "learning rate")
    base = _positive(series.learning_rate)
    effective = _positive(series.effective_learning_rate)
    if not np.isfinite(base).any():
        return say(ax, "the log holds no learning rate")
    at = thin(base, effective, keep=series.intervened)
    color = COLORS["learning_rate"]
    ax.fill_between(series.step[at], effective[at], base[at], color=color, alpha=0.2, linewidth=0)
    ax.plot(series.step[at], base[at], color=color, linewidth=1, linestyle=(0, (4, 2)))
    ax.plot(series.step[at], effective[at], color=color, linewidth=1.6)
    use_log_scale(ax, base, effective, max_depth=1e-3)
    label_ends(ax, [
        (last_finite(effective), "effective", color),
        (last_finite(base), "base", color),
    ])  # fmt: skip
    if series.intervened.any():
        note(ax, f"{removed_area(series):.1%} of the area removed")
    return ax


def plot_distribution(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the distribution of the proposed r in three phases of the run, with the clip rates.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "Distribution of r by phase", "", "r = step distance / radius")
    is_shown = np.isfinite(series.proposed) & (series.proposed > 0)
    if not is_shown.any():
        return say(ax, "no step was measured")
    exponents = np.log10(series.proposed[is_shown])
    exponents = exponents.clip(min=np.median(exponents) - 3)  # not the end of a schedule at 0
    edges = np.linspace(min(exponents.min(), -0.1), max(exponents.max(), 0.1), 61)
    for place, phase in enumerate(np.array_split(np.arange(len(series.step)), len(PHASES))):
        values = series.proposed[phase][is_shown[phase]]
        counts, _ = np.histogram(np.log10(values).clip(min=edges[0]), edges)
        height = -place + 0.85 * counts / max(counts.max(), 1)
        ax.stairs(
            height, 10**edges, baseline=-place, fill=True,
            color=COLORS["normalized_step"], alpha=0.75,
        )  # fmt: skip
        rate = series.clipped[phase].mean() if len(phase) else 0.0
        ax.annotate(
            f"{rate:.1%}\nclipped", (1.0, -place + 0.4), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", annotation_clip=False,
            color=COLORS["intervention"] if rate else INK,
        )  # fmt: skip
    make_log(ax, "x")
    ax.set_yticks([0, -1, -2], PHASES)
    ax.grid(visible=False, axis="y")
    mark_limit(ax, axis="x")
    return ax


def plot_prediction(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the r of the step taken against the loss that followed: does r predict?

    The line is the median in ten equal shares of the steps; the figure names Spearman's rank
    correlation of r with the ratio of the losses.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "What followed a step", "loss after / loss before", "r of the step taken")
    r, ratio = loss_ratios(series)
    if len(r) < 2:
        return say(ax, "no two neighbouring steps with a loss")
    order = np.argsort(r)
    at = order[thin(ratio[order], r[order])]
    dots(ax, r[at], ratio[at], "normalized_step", size=3)
    shares = np.array_split(order, min(10, len(r)))
    middle = [(np.median(r[share]), np.median(ratio[share])) for share in shares]
    ax.plot(*zip(*middle, strict=True), color=INK, linewidth=1.6, marker="o", markersize=3)
    make_log(ax, "x")
    use_log_scale(ax, ratio, ratio=3)
    ax.axhline(1, color=INK, linewidth=0.8, alpha=0.5)
    mark_limit(ax, axis="x")
    note(ax, f"rank correlation {rank_correlation(r, ratio):+.2f}", INK)
    return ax


def plot_cost(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the time the guard took at each step.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "Cost of the guard", "time per step (ms)")
    milliseconds = 1e3 * series.seconds
    if not np.isfinite(milliseconds).any():
        return say(ax, "the log holds no times")
    at = thin(milliseconds)
    ax.plot(series.step[at], milliseconds[at], color=COLORS["seconds"], linewidth=1)
    use_log_scale(ax, milliseconds[milliseconds > 0])
    median = float(np.nanmedian(milliseconds))
    ax.axhline(median, color=INK, linewidth=1, linestyle=":")
    label_ends(ax, [(median, f"median\n{median:.3g} ms", INK)])
    return ax


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation (ties in order of appearance), NaN if undefined.

    Args:
        x: Values. Shape ``[T]``.
        y: Values. Shape ``[T]``.

    Returns:
        A number in [-1, 1].

    Example:
        >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0]))
        1.0
    """
    if len(x) < 2:
        return float("nan")
    rank_x, rank_y = (np.argsort(np.argsort(v, kind="stable"), kind="stable") for v in (x, y))
    squares = float(((rank_x - rank_y) ** 2).sum())
    return 1 - 6 * squares / (len(x) * (len(x) ** 2 - 1))


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)  # 0 has no logarithm


def _touched(series: StepSeries) -> str:
    count = int(series.intervened.sum())
    return f"{count} step{'s' * (count != 1)} touched"
