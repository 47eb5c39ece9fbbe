"""One quantity of every worker over time."""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from safestep.plots.figure_registry import figure, has_worker_columns
from safestep.plots.log_axis import make_log
from safestep.plots.style import COLORS, INK, MAX_MARKS, make_axes, note, say
from safestep.plots.wording import count, number, percent, plural
from safestep.runlog.reader import Run
from safestep.runlog.series import micro_means, scalar, worker_noun

__all__ = ["HEATMAP_QUANTITIES", "plot_micro_batches", "plot_worker_heatmap"]

HEATMAP_QUANTITIES = {
    "loss": "loss (nats)",
    "grad_norm": "gradient norm (loss per distance)",
    "cosine_to_mean": "cosine to mean (gradients)",
}
MAX_COLUMNS = 400


def plot_worker_heatmap(run: Run, ax: Axes | None = None, *, quantity: str = "loss") -> Axes:
    """Draw one quantity of every worker over time, with a cross where one worker stands out.

    Where the steps are too many to show, each column is a stretch of steps and holds, of each
    worker, the value farthest from the workers' median.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.
        quantity: "loss", "grad_norm" or "cosine_to_mean".

    Returns:
        The axes.

    Raises:
        ValueError: If the quantity is none of these.
    """
    if quantity not in HEATMAP_QUANTITIES:
        raise ValueError(
            f"plot_worker_heatmap: expected `quantity` in {tuple(HEATMAP_QUANTITIES)}, "
            f"got {quantity!r}. Use one of them."
        )
    unit = HEATMAP_QUANTITIES[quantity]
    noun = worker_noun(run)
    ax = make_axes(ax, f"{plural(noun).capitalize()}: {unit.split(' (')[0]}", noun)
    values = run.workers.get(quantity)
    if values is None or values.ndim != 2 or not np.isfinite(values).any():
        return say(ax, f"the log holds no {unit.split(' (')[0]} by {noun}")
    _draw(ax, run.workers["step"], values, unit)
    _mark_outliers(ax, run)
    return ax


def plot_micro_batches(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the loss of every micro-batch of a step, the mean over the ranks, over time.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    ax = make_axes(ax, "Micro-batches: loss", "micro-batch of the step")
    steps, values = micro_means(run, "loss")
    if not np.isfinite(values).any():
        return say(ax, "the log holds no loss by micro-batch")
    _draw(ax, steps, values, HEATMAP_QUANTITIES["loss"])
    return ax


def _draw(ax: Axes, steps: np.ndarray, values: np.ndarray, unit: str) -> None:
    """Draw a row for each column of the values; at least one of them is finite."""
    steps, shown = _columns(steps, values)
    edges = np.append(steps, steps[-1] + max(1, steps[-1] - steps[-2] if len(steps) > 1 else 1))
    image = ax.pcolormesh(
        edges, np.arange(values.shape[1] + 1) - 0.5, shown.T,
        norm=_norm(values), cmap="viridis", rasterized=True,
    )  # fmt: skip
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    if isinstance(image.norm, LogNorm):
        make_log(bar.ax, "y")
    bar.set_label(unit.replace(" (", "\n("), color=INK)
    bar.ax.tick_params(colors=INK, which="both")
    ax.set_yticks(_ranks(values.shape[1]))
    ax.grid(visible=False)


def _columns(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return first step and values of each column of the image: one step, or a stretch of them."""
    if len(steps) <= MAX_COLUMNS:
        return steps, values
    median = np.full(len(values), np.nan)
    is_known = np.isfinite(values).any(axis=1)
    median[is_known] = np.nanmedian(values[is_known], axis=1)
    distance = np.nan_to_num(abs(values - median[:, None]), nan=-1.0)
    starts = np.linspace(0, len(steps), MAX_COLUMNS, endpoint=False).astype(int)
    stretches = zip(starts, [*starts[1:], len(steps)], strict=True)
    farthest = np.array([start + distance[start:end].argmax(axis=0) for start, end in stretches])
    return steps[starts], np.take_along_axis(values, farthest, axis=0)


def _norm(values: np.ndarray) -> Normalize:
    """Return a colour scale that a few wild values do not flatten."""
    low, high = np.quantile(values[np.isfinite(values)], [0.01, 0.99])
    return LogNorm(low, high) if 0 < 10 * low < high else Normalize(low, high)


def _ranks(num_workers: int) -> np.ndarray:
    return np.arange(0, num_workers, -(-num_workers // 8))


def _mark_outliers(ax: Axes, run: Run) -> None:
    outlier = scalar(run, "outlier")
    is_named = np.isfinite(outlier)
    if not is_named.any():
        return
    ax.plot(
        run.workers["step"][is_named], outlier[is_named], "x", color=COLORS["intervention"],
        markersize=4, rasterized=is_named.sum() > MAX_MARKS,
    )  # fmt: skip
    note(ax, "x: stands out", below=True)


def _says(quantity: str) -> Callable[[Run], str]:
    def says(run: Run) -> str:
        noun, values = worker_noun(run), run.workers[quantity]
        recent = values[-max(1, len(values) // 10) :]
        medians = {
            worker: float(np.nanmedian(column))
            for worker, column in enumerate(recent.T) if np.isfinite(column).any()
        }  # fmt: skip
        name = HEATMAP_QUANTITIES[quantity].split(" (")[0]
        if not medians:
            return f"The {name} of the last {plural(noun)} is not finite."
        low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
        ends = (
            f"Over the last tenth of the run, the median {name} was lowest in {noun} {low} "
            f"({number(medians[low])}) and highest in {noun} {high} ({number(medians[high])})"
        )
        return f"{ends}; {_standing_out(run, noun)}."

    return says


def _standing_out(run: Run, noun: str) -> str:
    outlier = scalar(run, "outlier")
    named = outlier[np.isfinite(outlier)].astype(int)
    if not len(named):
        return "none stood out at any step"
    workers, times = np.unique(named, return_counts=True)
    most, records = workers[times.argmax()], count(len(outlier), "measured step")
    return f"{noun} {most} stood out most often, at {times.max():,} of {records}"


for _quantity, _unit in HEATMAP_QUANTITIES.items():
    figure(
        f"workers_{_quantity}",
        caption=f"One row each: {_unit}. A cross marks one that stands out at a step.",
        says=_says(_quantity), has_data=has_worker_columns(_quantity),
        is_first=_quantity == "loss",
    )(partial(plot_worker_heatmap, quantity=_quantity))  # fmt: skip


def _micro_says(run: Run) -> str:
    values = micro_means(run, "loss")[1]
    known = values[np.isfinite(values).all(axis=1)]
    if not len(known) or known.shape[1] < 2:
        return "The log holds too few losses of micro-batches to compare."
    spread = float(np.median(known.std(axis=1) / np.abs(known.mean(axis=1)).clip(1e-300)))
    means = known.mean(axis=0)
    low, high = int(means.argmin()), int(means.argmax())
    return (
        f"In the median step the micro-batches' losses vary by {percent(spread)} of their mean "
        "(standard deviation); "
        f"on average micro-batch {low} has the lowest ({number(float(means[low]))}) and "
        f"micro-batch {high} the highest ({number(float(means[high]))})."
    )


figure(
    "micro_batches",
    caption="One row for each micro-batch of a step, the first below: mean loss of the ranks.",
    says=_micro_says, has_data=lambda run: bool(np.isfinite(micro_means(run, "loss")[1]).any()),
)(plot_micro_batches)  # fmt: skip
