"""From the runs of bench_peers.py to the numbers that are compared, and their table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

# Where options were chosen; what is reported comes from the other tasks.
TUNED = ("character GPT", "digits MLP")
COLUMNS = ["loss", "accuracy", "touched", "seconds", "spikes", "steps", "start"]


class Runs:
    """The runs of a JSON file, and what each rule kept of the training and what it cost.

    Args:
        found: What the file holds.
    """

    def __init__(self, found: dict[str, Any]) -> None:
        self.columns: list[str] = found["columns"]
        self.runs: dict[str, Any] = found["runs"]
        self.tasks = list(self.runs)
        self.rules = list(dict.fromkeys(rule for task in self.tasks for rule in self.runs[task]))
        self.situations = list(
            dict.fromkeys(s for task in self.tasks for s in self.runs[task]["nothing"])
        )

    def seeds(self, task: str, rule: str = "nothing", situation: str = "healthy") -> list[str]:
        """Return the seeds that were run."""
        return sorted(self.runs[task].get(rule, {}).get(situation, {}))

    def has(self, task: str, rule: str, situations: Iterable[str]) -> bool:
        """Return whether a rule was run in all of the situations, by one seed at least."""
        return all(self.seeds(task, rule, situation) for situation in situations)

    def values(
        self, task: str, rule: str, situation: str, column: str, seeds: Iterable[str] | None = None
    ) -> list[float]:
        """Return a column over the seeds; a loss that is not finite is infinite."""
        place = self.columns.index(column)
        rows = self.runs[task].get(rule, {}).get(situation, {})
        chosen = [rows[seed][place] for seed in (rows if seeds is None else seeds)]
        return [math.inf if value is None else value for value in chosen]

    def mean(
        self, task: str, rule: str, situation: str, column: str, seeds: Iterable[str] | None = None
    ) -> float:
        """Return the mean over the seeds, NaN where nothing was run."""
        return statistics.fmean(self.values(task, rule, situation, column, seeds) or [math.nan])

    def kept(self, task: str, rule: str, situation: str) -> dict[str, float]:
        """Return, by seed, the share of the progress that healthy AdamW makes, in [0, 1].

        kept = (loss before training - final loss) / (the same of healthy AdamW on that seed).
        """
        rows = self.runs[task].get(rule, {}).get(situation, {})
        loss, start = self.columns.index("loss"), self.columns.index("start")
        shares = {}
        for seed, row in rows.items():
            plain = self.runs[task]["nothing"]["healthy"][seed]
            progress = plain[start] - plain[loss]
            final = math.inf if row[loss] is None else row[loss]
            shares[seed] = min(1.0, max(0.0, (plain[start] - final) / progress))
        return shares

    def kept_of_all(self, task: str, rule: str, situations: Iterable[str]) -> dict[str, float]:
        """Return `kept` as the mean of the situations, by seed that was run in all of them."""
        found = [self.kept(task, rule, situation) for situation in situations]
        seeds = sorted(set(found[0]).intersection(*found[1:]))
        return {seed: statistics.fmean(shares[seed] for shares in found) for seed in seeds}

    def time_ratios(self, task: str, rule: str) -> dict[str, float]:
        """Return the CPU time of a healthy run as a multiple of AdamW alone, by seed."""
        place = self.columns.index("seconds")
        seconds, plain = (self.runs[task].get(r, {}).get("healthy", {}) for r in (rule, "nothing"))
        return {seed: row[place] / plain[seed][place] for seed, row in sorted(seconds.items())}

    def rates(self, task: str, rule: str) -> dict[float, str]:
        """Return the situations of a sweep, by the factor of the learning rate."""
        found = {1.0: "healthy"}
        for situation in self.runs[task].get(rule, {}):
            if situation.startswith("rate x"):
                found[float(situation.removeprefix("rate x"))] = situation
        return dict(sorted(found.items()))

    def span(self, task: str, rule: str, tolerance: float = 0.01) -> float:
        """Return the widest range of rates, as a ratio, that keep the best of AdamW's progress.

        A rate is in the range where the progress is within `tolerance` of the best that AdamW
        alone makes at any rate, over the seeds that both were run on at all of them; 0 where none
        is, 1 where one is, NaN where no seed is left.
        """
        sweep = self.rates(task, rule)
        seeds = set.intersection(
            *(set(self.seeds(task, r, name)) for r in (rule, "nothing") for name in sweep.values())
        )
        if not seeds:
            return math.nan
        start = self.mean(task, "nothing", "healthy", "start", seeds)
        best = min(self.mean(task, "nothing", name, "loss", seeds) for name in sweep.values())
        enough = (1 - tolerance) * (start - best)
        widest, first = 0.0, None
        for factor, name in sweep.items():
            if start - self.mean(task, rule, name, "loss", seeds) < enough:
                first = None
                continue
            first = factor if first is None else first
            widest = max(widest, factor / first)
        return widest


def table(runs: Runs, task: str) -> str:
    """Return held-out losses, mean over the seeds and half their range, as a Markdown table."""
    shown = [s for s in runs.situations if not s.startswith("rate x")]
    lines = [f"| {task} | {' | '.join(shown)} | touched, healthy | spikes | rates | CPU time |"]
    lines.append("|" + "---|" * (len(shown) + 5))
    for rule in runs.rules if task in runs.tasks else ():
        cells = [_cell(runs.values(task, rule, situation, "loss")) for situation in shown]
        touched = runs.mean(task, rule, "healthy", "touched")
        spikes = [runs.mean(task, rule, situation, "spikes") for situation in shown]
        cells += [
            f"{touched:.0f}" if math.isfinite(touched) else "?",
            f"{statistics.fmean(spikes):.3f}", f"x{runs.span(task, rule):.3g}",
            f"{statistics.fmean(runs.time_ratios(task, rule).values() or [math.nan]):.2f}",
        ]  # fmt: skip
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(losses: list[float]) -> str:
    if not losses or math.inf in losses:
        return "lost" if losses else ""
    return f"{statistics.mean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}"
