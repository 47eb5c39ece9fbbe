"""The training loss of a run, and whether r said anything about what it did next."""

import numpy as np
from matplotlib.axes import Axes

from safestep.plots.figure_registry import figure, has_step
from safestep.plots.log_axis import make_log, use_log_scale
from safestep.plots.style import (
    COLORS,
    INK,
    dots,
    make_axes,
    mark_limit,
    mark_steps,
    note,
    say,
    show_whole_run,
)
from safestep.plots.wording import count, number, sentence
from safestep.runlog.reader import Run
from safestep.runlog.series import loss_ratios, step_series, thin

__all__ = ["plot_loss", "plot_prediction", "rank_correlation", "say_correlation"]

_WEAK, _STRONG = 0.1, 0.5  # rank correlations below and above which words differ
_MAX_DOTS = 2000
_FEW = 10  # steps; fewer say nothing about a correlation


def _loss_says(run: Run) -> str:
    series = step_series(run)
    known = np.flatnonzero(np.isfinite(series.loss))
    first, last = known[0], known[-1]
    course = (
        f"the loss went from {number(float(series.loss[first]))} at step {series.step[first]} to "
        f"{number(float(series.loss[last]))} at step {series.step[last]}"
    )
    later = set(series.step[last + 1 :].tolist())
    if np.isinf(series.loss[last + 1 :]).any() or later & (run.nan_losses or set()):
        course += " and is not finite after it"
    scaled, left_out = int(series.clipped.sum()), int(series.skipped.sum())
    touched = [f"{count(scaled, 'step')} scaled down"] if scaled else []
    touched += [f"{count(left_out, 'step')} not taken"] if left_out else []
    return sentence(f"{course}; {' and '.join(touched) or 'the guard changed no step'}")


@figure(
    "loss",
    caption="Ticks at the upper edge: steps that the guard scaled down or did not take.",
    says=_loss_says, has_data=has_step("loss"), is_first=True,
)  # fmt: skip
def plot_loss(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the training loss, with a tick at the upper edge for each step the guard changed.

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
    show_whole_run(ax, series.step)
    touched = count(int(series.intervened.sum()), "step")
    mark_steps(ax, series.step[series.intervened], "|", f"{touched} touched")
    return ax


def _has_prediction(run: Run) -> bool:
    return bool(np.isfinite(step_series(run).loss).sum() > 1) and has_step("proposed")(run)


def _prediction_says(run: Run) -> str:
    r, ratio = loss_ratios(step_series(run))
    rho = rank_correlation(r, ratio)
    if len(r) < _FEW:
        return f"Only {count(len(r), 'step')} with r and two losses: too few to say."
    if np.isnan(rho):
        return f"r or the loss change was the same at all {len(r):,} steps: nothing to compare."
    correlation = f"{say_correlation(rho)} over {len(r):,} steps"
    if abs(rho) < _WEAK:
        return f"r did not predict the loss change here: {correlation}."
    strength = "clearly" if abs(rho) >= _STRONG else "weakly"
    return (
        f"A larger r {strength} went with a {'higher' if rho > 0 else 'lower'} loss at the next "
        f"step: {correlation}."
    )


@figure(
    "prediction",
    caption="Each dot is a step: its r, and the next loss over this one. Line: the median of each "
    "tenth of the steps.",
    says=_prediction_says, has_data=_has_prediction,
)  # fmt: skip
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
    at = order[:: -(-len(order) // _MAX_DOTS)]  # evenly: extremes alone would look like bands
    dots(ax, r[at], ratio[at], "normalized_step", size=3)
    shares = np.array_split(order, min(10, len(r)))
    middle = [(np.median(r[share]), np.median(ratio[share])) for share in shares]
    ax.plot(*zip(*middle, strict=True), color=INK, linewidth=1.6, marker="o", markersize=3)
    make_log(ax, "x")
    use_log_scale(ax, ratio, ratio=3)
    ax.axhline(1, color=INK, linewidth=0.8, alpha=0.5)
    mark_limit(ax, axis="x")
    rho = rank_correlation(r, ratio)
    if np.isfinite(rho):
        note(ax, say_correlation(rho), INK)
    return ax


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation, ties at their mean rank, NaN where one is constant.

    Args:
        x: Values. Shape ``[T]``.
        y: Values. Shape ``[T]``.

    Returns:
        A number in [-1, 1].

    Example:
        >>> round(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 100.0])), 12)
        1.0
        >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.ones(3))
        nan
    """
    if len(x) < 2:
        return float("nan")
    ranks = [_mean_ranks(values) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    norms = [float(np.sqrt((rank**2).sum())) for rank in centred]
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if min(norms) else float("nan")


def say_correlation(rho: float) -> str:
    """Return a rank correlation in words.

    Args:
        rho: The correlation.

    Returns:
        The text.

    Example:
        >>> say_correlation(-0.002), say_correlation(-0.5)
        ('rank correlation 0.00', 'rank correlation -0.50')
    """
    return f"rank correlation {round(rho, 2) + 0.0:.2f}"  # -0.0 + 0.0 is 0.0


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return each value's rank, the mean of their places for equal values. Shape ``[T]``."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
