"""The steps of a run against their radius: r over time, distances, distribution."""

import numpy as np
from matplotlib.axes import Axes

from safestep.plots.figure_registry import figure, has_step
from safestep.plots.log_axis import make_log, use_log_scale
from safestep.plots.measured_how import how_measured
from safestep.plots.style import (
    COLORS,
    INK,
    dots,
    label_ends,
    last_finite,
    line_by_trust,
    make_axes,
    mark_limit,
    mark_steps,
    note,
    say,
    show_whole_run,
)
from safestep.plots.wording import count, number, percent
from safestep.runlog.reader import Run
from safestep.runlog.series import FEW, StepSeries, positive, step_series, thin

__all__ = ["plot_distribution", "plot_normalized_step", "plot_safe_zone"]

PHASES = ("early", "middle", "late")
_LEAST_BAR = 0.06  # share of the height that a phase has
_THIRDS = ("the first third", "the second", "the last third")


def _normalized_step_says(run: Run) -> str:
    series = step_series(run)
    r = series.proposed[~np.isnan(series.proposed)]
    peak, at = float(r.max()), series.step[int(np.nanargmax(series.proposed))]
    median, over = number(float(np.median(r))), int((r > 1).sum())
    if over:
        return (
            f"r was over 1 at {over:,} of {count(len(r), 'step')}; the largest was "
            f"{number(peak)} at step {at}, the median {median}."
        )
    text = f"r stayed at or under {number(peak)} (median {median})"
    if not 0 < peak < 1:
        return f"{text}."
    return f"{text}: under r = 1 by a factor of {number(1 / peak)}."


@figure(
    "normalized_step",
    caption="r is the length of the proposed step over the radius. Up to r = 1 the local expansion "
    "of the loss converges at the step; over it there is no such promise. Orange dots: scaled down "
    "to the blue ones. Crosses: not taken. Pale: predicted.",
    says=_normalized_step_says, has_data=has_step("proposed"), is_first=True,
)  # fmt: skip
def plot_normalized_step(run: Run, ax: Axes | None = None) -> Axes:
    """Draw r, the proposed step over its radius, with the line r = 1.

    Steps that the guard scaled have a dot at the r proposed and one at the r taken; those it did
    not take have a cross at the upper edge. An r that was predicted, not measured, is drawn thin
    and pale.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    series = step_series(run)
    ax = make_axes(ax, "Normalized step", "r = step distance / radius")
    r = positive(series.proposed)
    if not np.isfinite(r).any():
        return say(ax, "no step was measured")
    at = thin(r, keep=series.intervened)
    predicted = how_measured(run)["predicted"]
    line_by_trust(ax, series.step[at], r[at], predicted[at], COLORS["normalized_step"])
    clipped = series.clipped
    dots(ax, series.step[clipped], r[clipped], "intervention")
    dots(ax, series.step[clipped], series.taken[clipped], "normalized_step", size=3)
    mark_steps(ax, series.step[series.skipped], "x", "x: step not taken")
    show_whole_run(ax, series.step)
    if clipped.any() and not series.skipped.any():
        note(ax, "orange: scaled to the blue dots")
    elif predicted.any() and not series.skipped.any():
        note(ax, "pale: predicted", COLORS["normalized_step"])
    mark_limit(ax)
    use_log_scale(ax, r, np.ones(1), ratio=10, max_depth=1e-3)
    ends = [(1.0, "r = 1", COLORS["radius"])]
    ends.append((last_finite(r), "r", COLORS["normalized_step"]))
    label_ends(ax, ends)
    return ax


def _distribution_says(run: Run) -> str:
    series = step_series(run)
    facts = []
    for name, phase in zip(_THIRDS, np.array_split(np.arange(len(series.step)), 3), strict=True):
        r = series.proposed[phase]
        if not np.isnan(r).all():
            scaled = int(series.clipped[phase].sum())
            clipped = f" ({count(scaled, 'step')} scaled down)" if scaled else ""
            facts.append(f"{number(float(np.nanmedian(r)))} in {name}{clipped}")
    return f"The median r was {', '.join(facts)} of the run."


@figure(
    "distribution",
    caption="How often which r was proposed, in each third of the run.",
    says=_distribution_says, has_data=has_step("proposed"), is_first=True,
)  # fmt: skip
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
        _draw_phase(ax, series, phase[is_shown[phase]], edges, -place)
        scaled = series.clipped[phase]
        text = _say_scaled(scaled) if is_shown[phase].any() else "no r"
        ax.annotate(
            text, (1.0, -place + 0.4), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", annotation_clip=False,
            color=COLORS["intervention"] if scaled.any() else INK,
        )  # fmt: skip
    make_log(ax, "x")
    ax.set_yticks([0.4, -0.6, -1.6], PHASES)
    ax.set_ylim(top=1.1)  # room for the limit's name
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    mark_limit(ax, axis="x")
    return ax


def _say_scaled(scaled: np.ndarray) -> str:
    """Return how many steps of a phase were scaled: their number, or their share if many."""
    share, total = scaled.mean(), int(scaled.sum())
    return f"{percent(float(share)) if share > FEW else count(total, 'step')}\nscaled"


def _draw_phase(
    ax: Axes, series: StepSeries, at: np.ndarray, edges: np.ndarray, base: float
) -> None:
    """Draw the histogram of r at some steps, standing on a base line."""
    counts, _ = np.histogram(np.log10(series.proposed[at]).clip(min=edges[0]), edges)
    heights = 0.85 * counts / max(counts.max(), 1)
    heights[counts > 0] = heights[counts > 0].clip(min=_LEAST_BAR)  # so that one step is seen
    ax.stairs(
        base + heights, 10**edges, baseline=base, fill=True,
        color=COLORS["normalized_step"], alpha=0.75,
    )  # fmt: skip


def _safe_zone_says(run: Run) -> str:
    series = step_series(run)
    r = series.proposed[~np.isnan(series.proposed)]
    longer = int((r > 1).sum())
    share = number(float(np.median(r)))
    return (
        f"The proposed step was longer than the radius at {longer:,} of {count(len(r), 'step')}; "
        f"in the median it was {share} times as long as the radius."
    )


@figure(
    "safe_zone",
    caption="The shaded zone is safe: there the step is shorter than the radius. Pale: predicted.",
    says=_safe_zone_says,
    has_data=lambda run: has_step("radius")(run) and has_step("proposed")(run),
)  # fmt: skip
def plot_safe_zone(run: Run, ax: Axes | None = None) -> Axes:
    """Draw step distance against radius over time; the safe zone lies under the radius.

    The proposed step is the line, the step taken a dot where the guard scaled it. A radius that
    was predicted, not measured, is drawn thin and pale.

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
    distance = positive(series.step_norm)[at]
    line_by_trust(ax, step, radius, how_measured(run)["predicted"][at], COLORS["radius"])
    ax.plot(step, distance, color=COLORS["step_norm"], linewidth=1.2)
    shown = [values[values > 0] for values in (radius, distance)]
    use_log_scale(ax, *shown, max_depth=1e-3)
    bottom = ax.get_ylim()[0] if ax.get_yscale() == "log" else 0.0
    ceiling = np.where(np.isposinf(radius), ax.get_ylim()[1], radius)
    ax.fill_between(step, bottom, ceiling, color=COLORS["radius"], alpha=0.13, linewidth=0)
    ax.set_ylim(bottom=bottom)
    show_whole_run(ax, series.step)
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
