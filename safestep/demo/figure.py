"""The figure, in the manner of the paper's Figures 6 and 10.

One column for each model; from above: test accuracy (or loss), r, the learning rate that was used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safestep.demo.experiment import PROTECTIONS, Outcome, Spike
from safestep.demo.jobs import Outcomes
from safestep.demo.tasks import Task, make_task
from safestep.plots.style import INK, LADDER_COLORS, PAPER, halo, label_ends, make_axes

COLORS = {
    "plain": INK,
    "clip": "#b87a00",
    "bound": LADDER_COLORS["bound"],
    "certified": LADDER_COLORS["certified"],
}
_NAMES = {  # beside the end of a line, with its last value
    "plain": "plain: {}",
    "clip": "gradient clipped at 1: {}",
    "bound": "safestep: {}\n(radius: bound, pi / spread)",
    "certified": "safestep: {}\n(radius: certified, larger)",
}
_CHANCE = 10.0  # percent, ten digits
_LARGEST_R = 1e6  # an unguarded r goes on to 1e15, which would flatten all that matters
_MUTED = "#747c84"
_SPIKE = "#d9480f"

Curve = Callable[[Outcome], np.ndarray]
Runs = dict[str, list[Outcome]]


def save_figures(outcomes: Outcomes, output: Path) -> list[Path]:
    """Write one figure for each spike, and a compact one, as PNG.

    Args:
        outcomes: What `run_jobs` returned.
        output: Folder for the files.

    Returns:
        The paths of the full figures.
    """
    paths = []
    for spike in dict.fromkeys(job.spike for job in outcomes if job.spike.severity != 1):
        for size in ("full", "compact"):
            figure = draw_spike(outcomes, spike, size=size)
            path = output / f"{spike.name}{'' if size == 'full' else '-compact'}.png"
            figure.savefig(path, dpi=160, facecolor=PAPER)
            plt.close(figure)
            paths += [path] * (size == "full")
    return paths


def draw_spike(
    outcomes: Outcomes, spike: Spike, *, size: Literal["full", "compact"] = "full"
) -> Figure:
    """Draw every way to train through one spike, beside the plain run that has none.

    Lines are medians over the seeds, bands go from the lowest to the highest.

    Args:
        outcomes: What `run_jobs` returned.
        spike: Which of the spikes.
        size: "full" shows all; "compact" leaves out the interventions and the learning rate, and
            fits the first screen of a README.

    Returns:
        The figure.
    """
    runs_by_task: dict[str, Runs] = defaultdict(lambda: defaultdict(list))
    for job, outcome in outcomes.items():
        if job.spike == spike:
            runs_by_task[job.task][job.protection].append(outcome)
        elif job.spike.severity == 1 and job.protection == "plain":
            runs_by_task[job.task]["no spike"].append(outcome)
    rows = (_draw_progress, _draw_interventions, _draw_normalized_step, _draw_learning_rate)
    heights = (3.0, 0.4, 2.2, 1.6)
    if size == "compact":
        rows, heights = (_draw_progress, _draw_normalized_step), (2.2, 1.3)
    columns = len(runs_by_task)
    figure, grid = plt.subplots(
        len(rows), columns, sharex=True, squeeze=False, layout="constrained",
        figsize=(6.0 * columns, sum(heights) + 0.7), height_ratios=heights,
    )  # fmt: skip
    for column, (name, runs) in zip(grid.T, runs_by_task.items(), strict=True):
        task = make_task(name)
        for draw, ax in zip(rows, column, strict=True):
            draw(ax, task, runs)
            _shade_spike(ax, task, spike)
        column[0].set_title(task.title, loc="left", color=INK, fontweight="bold")
        _name_spike(column[0], task, spike)
        column[-1].set_xlabel("step", color=INK)
    return figure


def _draw_progress(ax: Axes, task: Task, runs: Runs) -> None:
    """Draw test accuracy where it was followed, otherwise the training loss."""
    make_axes(ax, "", "test accuracy (%)" if task.evaluates_every_step else "training loss", "")
    curve, spec = (_accuracy, "{:.1f} %") if task.evaluates_every_step else (_smooth_loss, "{:.2f}")
    ends = _draw_runs(ax, runs, curve)
    labels = [(y, _NAMES[way].format(spec.format(y)), COLORS[way]) for way, y in ends]
    if runs["no spike"]:
        middle = np.median([curve(run) for run in runs["no spike"]], axis=0)
        ax.plot(middle, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        labels.append((middle[-1], f"plain, no spike: {spec.format(middle[-1])}", _MUTED))
    if task.evaluates_every_step:
        ax.set_ylim(0, 103)
        ax.axhline(_CHANCE, color=_MUTED, linewidth=0.8, linestyle=":")
        ax.text(task.spike_step - 2, _CHANCE + 1, "chance", color=_MUTED, ha="right")
    label_ends(ax, labels)


def _draw_interventions(ax: Axes, task: Task, runs: Runs) -> None:
    """Draw a tick for each step that the guard of the first seed scaled down."""
    guarded = [way for way in PROTECTIONS if PROTECTIONS[way].is_guarded and runs[way]]
    ax.set_axis_off()
    ax.set_ylim(len(guarded) - 0.3, -0.7)
    for row, way in enumerate(guarded):
        steps = [report.step for report in runs[way][0].reports if report.scale != 1.0]
        ax.plot(steps, np.full(len(steps), row), "|", color=COLORS[way], markersize=7)
        text = f"{len(steps)} step{'s' * (len(steps) != 1)} scaled down"
        ax.annotate(
            text, (1.0, row), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", color=COLORS[way], va="center",
        )  # fmt: skip


def _draw_normalized_step(ax: Axes, task: Task, runs: Runs) -> None:
    """Draw r of the steps that were taken; what the optimizer proposed is a thin line."""
    make_axes(ax, "", "r of the step taken", "")
    ax.set_yscale("log")
    labels = [(1.0, "r = 1, the limit", _MUTED)]
    for way in PROTECTIONS:
        if runs[way] and PROTECTIONS[way].is_guarded:
            proposed = np.median([_proposed(run) for run in runs[way]], axis=0)
            ax.plot(proposed, color=COLORS[way], linewidth=0.8, alpha=0.6, linestyle=":")
            labels[1:] = [(3e4, "dotted: proposed,\nthen scaled down", _MUTED)]
    _draw_runs(ax, runs, _taken)
    ax.axhline(1.0, color=_MUTED, linewidth=1, linestyle=(0, (5, 3)), zorder=1.5)
    lowest, highest = ax.get_ylim()
    ax.set_ylim(max(lowest, 1e-3), min(highest, _LARGEST_R))
    label_ends(ax, labels)


def _draw_learning_rate(ax: Axes, task: Task, runs: Runs) -> None:
    """Draw scale x learning rate."""
    make_axes(ax, "", "effective\nlearning rate", "")
    ax.set_yscale("log")
    _draw_runs(ax, runs, _effective_learning_rate)


def _draw_runs(ax: Axes, runs: Runs, curve: Curve) -> list[tuple[str, float]]:
    # Returns where each of the four ways ends.
    ends = []
    for way in PROTECTIONS:
        if not runs[way]:
            continue
        curves = np.array([curve(run) for run in runs[way]])
        middle = np.median(curves, axis=0)
        ax.plot(middle, color=COLORS[way], linewidth=1.6)
        if len(curves) > 1:
            ax.fill_between(
                range(len(middle)), curves.min(0), curves.max(0), color=COLORS[way], alpha=0.12,
                linewidth=0,
            )  # fmt: skip
        ends.append((way, float(middle[-1])))
    return ends


def _shade_spike(ax: Axes, task: Task, spike: Spike) -> None:
    if spike.is_held:
        ax.axvspan(task.spike_step, task.num_steps, color=_SPIKE, alpha=0.06, linewidth=0)
    ax.axvline(task.spike_step, color=_SPIKE, linewidth=1, zorder=1)


def _name_spike(ax: Axes, task: Task, spike: Spike) -> None:
    when = "from here on" if spike.is_held else "for this one step"
    ax.text(
        task.spike_step + 0.015 * task.num_steps, 0.5,
        f"learning rate x {spike.severity:,g}\n{when}", color=_SPIKE, va="center",
        transform=ax.get_xaxis_transform(), path_effects=halo(),
    )  # fmt: skip


def _accuracy(outcome: Outcome) -> np.ndarray:
    return np.array([accuracy["test"] for accuracy in outcome.accuracies])


def _smooth_loss(outcome: Outcome, window: int = 10) -> np.ndarray:
    """Return the mean loss of the last few steps at each step."""
    sums = np.cumsum([0.0, *outcome.losses])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _proposed(outcome: Outcome) -> np.ndarray:
    return np.array([report.normalized_step for report in outcome.reports])


def _taken(outcome: Outcome) -> np.ndarray:
    return _proposed(outcome) * [report.scale for report in outcome.reports]


def _effective_learning_rate(outcome: Outcome) -> np.ndarray:
    return np.array([report.effective_learning_rate for report in outcome.reports])
