"""How a run's workers (dis)agree, each figure a function from a run to matplotlib axes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import NullLocator

from safestep.plots.style import (
    COLORS,
    INK,
    MAX_MARKS,
    PlainLogFormatter,
    label_ends,
    last_finite,
    make_axes,
    note,
    say,
    use_log_scale,
)
from safestep.runlog.reader import Run
from safestep.runlog.series import scalar, thin

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
    ax = make_axes(ax, f"Workers: {unit.split(' (')[0]}", "worker")
    values = run.workers.get(quantity)
    if values is None or values.ndim != 2 or not np.isfinite(values).any():
        return say(ax, f"the log holds no {unit.split(' (')[0]} by worker")
    steps, shown = _columns(run.workers["step"], values)
    edges = np.append(steps, steps[-1] + max(1, steps[-1] - steps[-2] if len(steps) > 1 else 1))
    image = ax.pcolormesh(
        edges, np.arange(values.shape[1] + 1) - 0.5, shown.T,
        norm=_norm(values), cmap="viridis", rasterized=True,
    )  # fmt: skip
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    if isinstance(image.norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(PlainLogFormatter())
        bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(unit.replace(" (", "\n("), color=INK)
    bar.ax.tick_params(colors=INK, which="both")
    ax.set_yticks(_ranks(values.shape[1]))
    ax.grid(visible=False)
    _mark_outliers(ax, run)
    return ax


def plot_dispersion(run: Run, ax: Axes | None = None) -> Axes:
    """Draw how far the workers' losses and gradient norms spread, each relative to its mean.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.

    Reference:
        "Silent Inconsistency in Data-Parallel Full Fine-Tuning", arXiv:2602.14462.
    """
    ax = make_axes(ax, "Dispersion of the workers", "standard deviation / mean")
    lines = {
        "gradient\nnorm": (scalar(run, "grad_norm_cv"), COLORS["grad_norm"]),
        "loss": (_relative_loss_std(run), COLORS["loss"]),
    }
    return _draw_lines(ax, run, lines, "the log holds no worker dispersion")


def plot_consistency(run: Run, ax: Axes | None = None) -> Axes:
    """Draw how well the workers' gradients agree in direction.

    Two different numbers: the mean cosine between two workers, and the least cosine of a worker
    with the mean gradient.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.

    Reference:
        "Silent Inconsistency in Data-Parallel Full Fine-Tuning", arXiv:2602.14462.
    """
    ax = make_axes(ax, "Consistency of the workers", "cosine")
    cosines = run.workers.get("cosine_to_mean")
    least = np.full(len(run.workers["step"]), np.nan)
    if cosines is not None and cosines.ndim == 2:
        is_known = np.isfinite(cosines).any(axis=1)
        least[is_known] = np.nanmin(cosines[is_known], axis=1)
    lines = {
        "mean of\npairs": (scalar(run, "pairwise_cosine"), COLORS["cosine"]),
        "least,\nto mean": (least, COLORS["intervention"]),
    }
    ax = _draw_lines(ax, run, lines, "the log holds no cosines")
    ax.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    return ax


def plot_noise_scale(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the gradient noise scale: the batch size at which noise and gradient are of one size.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.

    Reference:
        McCandlish et al., arXiv:1812.06162, App. A.
    """
    ax = make_axes(ax, "Gradient noise scale", "noise scale (examples)")
    scale = scalar(run, "noise_scale")
    if np.isposinf(scale).any():
        note(ax, "gaps: infinite", INK)
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, np.nan)
    if np.isnan(scale).all():
        return say(ax, "the log holds no noise scale")
    at = thin(scale)
    color = COLORS["noise_scale"]
    ax.plot(run.workers["step"][at], scale[at], color=color, linewidth=0.7, alpha=0.5)
    steps, median = _running_median(run.workers["step"], scale)
    ax.plot(steps, median, color=color, linewidth=1.8)
    use_log_scale(ax, scale)
    ax.set_xlim(run.workers["step"][0], run.workers["step"][-1] + 1)
    label_ends(ax, [(last_finite(median), "median", color)])
    return ax


def _draw_lines(ax: Axes, run: Run, lines: dict[str, tuple[np.ndarray, str]], empty: str) -> Axes:
    lines = {name: line for name, line in lines.items() if np.isfinite(line[0]).any()}
    if not lines:
        return say(ax, empty)
    ends = []
    for name, (values, color) in lines.items():
        is_known = np.isfinite(values)  # some are measured at every tenth step only
        step, known = run.workers["step"][is_known], values[is_known]
        at = thin(known)
        ax.plot(step[at], known[at], color=color, linewidth=0.7, alpha=0.45)
        middle, median = _running_median(step, known)
        ax.plot(middle, median, color=color, linewidth=1.8)
        ends.append((median[-1], name, color))
    label_ends(ax, ends)
    return ax


def _running_median(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the medians of forty equal stretches, at their middles: the trend behind the noise."""
    shares = [
        share for share in np.array_split(np.arange(len(steps)), min(40, len(steps)))
        if np.isfinite(values[share]).any()
    ]  # fmt: skip
    middles = np.array([np.median(steps[share]) for share in shares])
    return middles, np.array([np.nanmedian(values[share]) for share in shares])


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
    note(ax, "x: stands out")


def _relative_loss_std(run: Run) -> np.ndarray:
    std, losses = scalar(run, "loss_std"), run.workers.get("loss")
    if losses is None or losses.ndim != 2:
        return np.full(len(std), np.nan)
    mean = abs(losses.mean(axis=1))
    return np.divide(std, mean, out=np.full(len(std), np.nan), where=mean > 0)
