"""What the guard took from a run: learning rate, and time."""

import numpy as np
from matplotlib.axes import Axes

from safestep.plots.figure_registry import figure, has_step
from safestep.plots.log_axis import use_log_scale
from safestep.plots.style import COLORS, INK, label_ends, last_finite, make_axes, say
from safestep.plots.wording import count, number, percent, sentence
from safestep.runlog.reader import Run
from safestep.runlog.series import (
    FEW,
    StepSeries,
    positive,
    removed_area,
    step_series,
    step_share,
    thin,
)

_MOST_POINTS = 500  # more would show extremes and hide the mean

__all__ = ["plot_cost", "plot_learning_rate", "say_lowered"]


def _learning_rate_says(run: Run) -> str:
    series = step_series(run)
    rates = series.learning_rate[np.isfinite(series.learning_rate)]
    low, high = (number(float(rate)) for rate in (rates.min(), rates.max()))
    scheduled = f"The learning rate was {low if low == high else f'between {low} and {high}'}"
    return f"{scheduled}; the guard {say_lowered(series)}."


def say_lowered(series: StepSeries) -> str:
    """Return what the guard did to the learning rate.

    Args:
        series: The steps.

    Returns:
        A predicate: the step and both rates where it did little, the mean where it did much.
    """
    done = [_say_clipped(series)] if series.clipped.any() else []
    skipped = series.step[series.skipped]
    if len(skipped):
        which = f"step {skipped[0]}" if len(skipped) == 1 else count(len(skipped), "step")
        done.append(f"did not take {which}")
    return ", and ".join(done) or "never lowered it"


def _say_clipped(series: StepSeries) -> str:
    clipped, removed = np.flatnonzero(series.clipped), removed_area(series)
    most = clipped[np.argmin(series.scale[clipped])]
    where, change = f"step {series.step[most]}", _from_to(series, most)
    if len(clipped) == 1:
        return f"lowered it at {where}{change}"
    done = f"lowered it at {count(len(clipped), 'step')}"
    if series.intervened.mean() > FEW and np.isfinite(removed):
        return f"{done}, by {percent(removed)} in the mean"
    return f"{done}, most at {where}{change}"


def _from_to(series: StepSeries, at: int) -> str:
    """Return the learning rates that a step was set to and taken at; nothing where unknown."""
    rates = series.learning_rate[at], series.effective_learning_rate[at]
    if not np.isfinite(rates).all():
        return ""
    return ", from {} to {}".format(*(number(float(rate)) for rate in rates))


@figure(
    "learning_rate",
    caption="Dashed: the optimizer's learning rate. Solid: what the step taken amounts to.",
    says=_learning_rate_says, has_data=has_step("learning_rate"), is_first=True,
)  # fmt: skip
def plot_learning_rate(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the optimizer's learning rate and the one that the steps taken amount to.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "Learning rate", "learning rate")
    base = positive(series.learning_rate)
    effective = positive(series.effective_learning_rate)
    if not np.isfinite(base).any():
        return say(ax, "the log holds no learning rate")
    at = thin(base, effective, keep=series.intervened)
    color = COLORS["learning_rate"]
    ax.fill_between(series.step[at], effective[at], base[at], color=color, alpha=0.2, linewidth=0)
    ax.plot(series.step[at], base[at], color=color, linewidth=1, linestyle=(0, (4, 2)))
    ax.plot(series.step[at], effective[at], color=color, linewidth=1.6)
    use_log_scale(ax, base, effective, max_depth=1e-3)
    if ax.get_yscale() == "linear":
        ax.set_ylim(bottom=0)  # a constant rate is a line in the middle, not noise
    if np.array_equal(effective, base, equal_nan=True):
        label_ends(ax, [(last_finite(base), "set and\ntaken", color)])
        return ax
    label_ends(ax, [
        (last_finite(effective), "taken", color), (last_finite(base), "set", color),
    ])  # fmt: skip
    return ax


def _cost_says(run: Run) -> str:
    worst = number(1e3 * float(np.nanmax(step_series(run).seconds)))
    return sentence(f"{say_cost(run)}, {worst} ms at most")


def say_cost(run: Run) -> str:
    """Return the time that the guard took at a step, and how many times as long it made steps.

    Args:
        run: A run with times.

    Returns:
        A clause.
    """
    mean, share = 1e3 * float(np.nanmean(step_series(run).seconds)), step_share(run)
    told = f"the guard took {number(mean)} ms a step in the mean"
    if not 0 <= share < 1:
        return told
    plain, times = mean * (1 - share) / share if share else np.nan, 1 / (1 - share)
    return f"{told}: steps of {number(plain)} ms without it took {number(times)} times as long"


@figure(
    "cost",
    caption="Time that the guard took at each step; in a long run, means over stretches of steps. "
    "Dotted: the mean over the run.",
    says=_cost_says, has_data=has_step("seconds"),
)  # fmt: skip
def plot_cost(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the time the guard took at each step, and its mean.

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
    shares = np.array_split(np.flatnonzero(np.isfinite(milliseconds)), _MOST_POINTS)
    shares = [share for share in shares if len(share)]
    means = [milliseconds[share].mean() for share in shares]
    ax.plot(
        series.step[[share[0] for share in shares]], means, color=COLORS["seconds"], linewidth=1
    )
    use_log_scale(ax, milliseconds[milliseconds > 0])
    if ax.get_yscale() == "linear":
        ax.set_ylim(bottom=0)
    mean = float(np.nanmean(milliseconds))
    ax.axhline(mean, color=INK, linewidth=1, linestyle=":")
    label_ends(ax, [(mean, f"mean\n{mean:.3g} ms", INK)])
    return ax
