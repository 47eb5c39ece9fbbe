"""How far a run's workers agree, and how much noise their gradients have."""

import numpy as np
from matplotlib.axes import Axes

from safestep.plots.figure_registry import figure, has_worker_scalar
from safestep.plots.log_axis import use_log_scale
from safestep.plots.style import COLORS, INK, label_ends, last_finite, make_axes, note, say
from safestep.plots.wording import count, number, percent, plural
from safestep.runlog.reader import Run
from safestep.runlog.series import scalar, thin, worker_noun

__all__ = ["plot_consistency", "plot_dispersion", "plot_noise_scale"]

_AGREEING, _UNRELATED = 0.5, 0.1  # mean cosines above and below which the words differ


def _dispersion_says(run: Run) -> str:
    noun, facts = worker_noun(run), []
    for what, values in (
        ("gradient norms", scalar(run, "grad_norm_cv")), ("losses", _relative_loss_std(run)),
    ):  # fmt: skip
        known = values[np.isfinite(values)]
        if len(known):
            facts.append(f"{what} by {percent(float(np.median(known)))}")
    if not facts:
        return f"How far the {plural(noun)} spread relative to their mean is unknown."
    return f"In the median step the {plural(noun)} differ in {' and in '.join(facts)} of the mean."


@figure(
    "dispersion",
    caption="Standard deviation at a step, relative to the mean. Bold: the trend.",
    says=_dispersion_says, has_data=has_worker_scalar("loss_std"),
)  # fmt: skip
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
    ax = make_axes(ax, f"Dispersion of the {plural(worker_noun(run))}", "standard deviation / mean")
    lines = {
        "gradient\nnorm": (scalar(run, "grad_norm_cv"), COLORS["grad_norm"]),
        "loss": (_relative_loss_std(run), COLORS["loss"]),
    }
    return _draw_lines(ax, run, lines, "the log holds no worker dispersion")


def _consistency_says(run: Run) -> str:
    cosine = scalar(run, "pairwise_cosine")
    middle = float(np.median(cosine[np.isfinite(cosine)]))
    noun, nouns = worker_noun(run), plural(worker_noun(run))
    meaning = (
        f"{nouns} agree on the direction" if middle >= _AGREEING
        else f"each {noun}'s gradient is mostly noise" if middle < _UNRELATED
        else f"{nouns} agree in part"
    )  # fmt: skip
    size = number(middle)
    return f"In the median, two {nouns}' gradients have a cosine of {size}: {meaning}."


@figure(
    "consistency",
    caption="How well the gradients agree in direction: 1 is agreement, 0 is none.",
    says=_consistency_says, has_data=has_worker_scalar("pairwise_cosine"),
)  # fmt: skip
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
    ax = make_axes(ax, f"Consistency of the {plural(worker_noun(run))}", "cosine")
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


def _noise_scale_says(run: Run) -> str:
    scale = scalar(run, "noise_scale")
    known, infinite = scale[np.isfinite(scale)], int(np.isposinf(scale).sum())
    unknown = f"; at {count(infinite, 'step')} the noise hid the gradient" if infinite else ""
    middle = number(float(np.median(known)))
    return (
        f"A batch much larger than {middle} {_unit(run)} would gain little (the median of "
        f"{count(len(known), 'step')}{unknown})."
    )


def _unit(run: Run) -> str:
    """Return what the noise scale counts: examples, where their number is known."""
    is_known = run.settings.get("num_examples", 1) != 1
    if is_known:
        return "examples"
    return {"worker": "workers' batches"}.get(worker_noun(run), plural(worker_noun(run)))


@figure(
    "noise_scale",
    caption="The batch size at which gradient and noise are of one size.",
    says=_noise_scale_says, has_data=has_worker_scalar("noise_scale"),
)  # fmt: skip
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
    ax = make_axes(ax, "Gradient noise scale", f"noise scale ({_unit(run)})")
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


def _relative_loss_std(run: Run) -> np.ndarray:
    std, losses = scalar(run, "loss_std"), run.workers.get("loss")
    if losses is None or losses.ndim != 2:
        return np.full(len(std), np.nan)
    mean = abs(losses.mean(axis=1))
    return np.divide(std, mean, out=np.full(len(std), np.nan), where=mean > 0)
