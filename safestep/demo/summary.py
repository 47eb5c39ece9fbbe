"""The tables at the end, one row for each way to train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from safestep.demo.experiment import PROTECTIONS, Outcome, Spike
from safestep.demo.jobs import Outcomes
from safestep.demo.tasks import make_task

_LOSS_STEPS = 30  # a mini-batch loss is noisy: the final loss is a mean over the last steps


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over the seeds of one way to train through one spike.

    Attributes:
        accuracy: Final test accuracy in percent; BatchNorm uses the test batch's statistics.
        running_accuracy: The same with BatchNorm's running statistics; NaN without BatchNorm.
        lowest_accuracy: Lowest test accuracy from the spike on; NaN if it was not followed.
        final_loss: Mean training loss of the last 30 steps.
        steps_clipped: Steps that were scaled down or not taken.
        largest_proposed: Largest r among the steps that the optimizer proposed.
        largest_taken: Largest r among the steps that were taken.
    """

    accuracy: float
    running_accuracy: float
    lowest_accuracy: float
    final_loss: float
    steps_clipped: float
    largest_proposed: float
    largest_taken: float


def summarize(outcomes: Sequence[Outcome], spike_step: int) -> Summary:
    """Return the medians over runs that differ in the seed only.

    Args:
        outcomes: The runs.
        spike_step: Step from which the lowest accuracy is looked for.

    Returns:
        The summary.
    """
    rows = np.array([_numbers(outcome, spike_step) for outcome in outcomes])
    return Summary(*np.median(rows, axis=0).tolist())


def _numbers(outcome: Outcome, spike_step: int) -> list[float]:
    last = outcome.accuracies[-1]
    after_spike = [accuracy["test"] for accuracy in outcome.accuracies[spike_step:]]
    proposed = np.array([report.normalized_step for report in outcome.reports])
    taken = proposed * [report.scale for report in outcome.reports]
    return [
        last["test"],
        last.get("running", np.nan),
        min(after_spike, default=np.nan),
        float(np.mean(outcome.losses[-_LOSS_STEPS:])),
        sum(report.status in ("clipped", "skipped") for report in outcome.reports),
        np.nanmax(proposed),
        np.nanmax(taken),
    ]


def summary_tables(outcomes: Outcomes) -> Iterator[Table]:
    """Yield a table for each model: a section for each spike, a row for each way to train.

    Args:
        outcomes: What `run_jobs` returned.

    Yields:
        Tables that rich prints.
    """
    for task_name, rows in _by_task(outcomes).items():
        task = make_task(task_name)
        summaries = {key: summarize(runs, task.spike_step) for key, runs in rows.items()}
        yield _table(task.title, summaries)


def _by_task(outcomes: Outcomes) -> dict[str, dict[tuple[Spike, str], list[Outcome]]]:
    """Return the runs that differ in the seed only, by task, spike and way to train."""
    groups: dict[str, dict[tuple[Spike, str], list[Outcome]]] = {}
    for job, outcome in outcomes.items():
        rows = groups.setdefault(job.task, {})
        rows.setdefault((job.spike, job.protection), []).append(outcome)
    return groups


def _table(title: str, summaries: dict[tuple[Spike, str], Summary]) -> Table:
    fields = [
        field
        for field in _COLUMNS
        if not all(np.isnan(getattr(summary, field)) for summary in summaries.values())
    ]
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1), pad_edge=False,
    )  # fmt: skip
    table.add_column(no_wrap=True)
    for field in fields:
        table.add_column(_COLUMNS[field][0], justify="right", no_wrap=True)
    previous = None
    for (spike, way), summary in summaries.items():
        if spike != previous:
            table.add_section()
            table.add_row(f"[bold]{spike.title}")
        cells = [format(getattr(summary, field), _COLUMNS[field][1]) for field in fields]
        table.add_row("  " + PROTECTIONS[way].title, *cells)
        previous = spike
    return table


_COLUMNS = {  # field of Summary: heading, format
    "accuracy": ("test\n%", ".1f"),
    "running_accuracy": ("stats\n%", ".1f"),
    "lowest_accuracy": ("lowest\n%", ".1f"),
    "final_loss": ("final\nloss", ".3g"),
    "steps_clipped": ("clipped\nsteps", ".0f"),
    "largest_proposed": ("r pro-\nposed", ".2g"),
    "largest_taken": ("r\ntaken", ".2g"),
}
_EXPLAINED = {  # field of Summary: what its column holds
    "accuracy": "test: accuracy at the end.",
    "running_accuracy": "stats: the same by BatchNorm's running statistics, where test uses the "
    "test batch's.",
    "lowest_accuracy": "lowest: the lowest from the spike on.",
    "final_loss": "final loss: training loss, mean over the last 30 steps.",
    "steps_clipped": "clipped: steps scaled down or not taken.",
    "largest_proposed": "r: step distance / radius, the largest of the run; 1 is the limit. The "
    "radius is the certified one in its own rows, the bound in the others.",
}


def caption(outcomes: Outcomes) -> str:
    """Return what the columns of the tables hold, those alone that are there.

    Args:
        outcomes: What `run_jobs` returned.

    Returns:
        The text.
    """
    rows = [row for runs in _by_task(outcomes).values() for row in runs.values()]
    numbers = np.array([_numbers(outcome, 0) for outcomes in rows for outcome in outcomes])
    fields = list(_COLUMNS)
    absent = {
        name for name, column in zip(fields, numbers.T, strict=True) if np.isnan(column).all()
    }
    seeds = "Medians over the seeds. " if any(len(row) > 1 for row in rows) else ""
    return seeds + " ".join(text for name, text in _EXPLAINED.items() if name not in absent)
