"""What a run is judged by: its loss, and the stretches where the guard stepped in or r was long."""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from safestep.report.bands import (
    MIN_WIDTH,
    TOLERANCE,
    aftermath,
    lost_is_infinite,
    upper_band,
)
from safestep.report.levels import Effect, effect_of
from safestep.report.second_runs import second_runs, without_second_run
from safestep.runlog.reader import Run
from safestep.runlog.series import StepSeries, spans, step_series

_JOINED_GAP = 10  # touched steps so near each other are one story
_LASTING = 10  # so many steps over the loss band, or under it again, are no chance
_MAX_JUDGED = 2000  # episodes whose loss is looked at, those of the largest r


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What episodes are judged by.

    Attributes:
        series: The steps.
        limit: Largest r that the guard let through.
        loss: The loss, infinite where it was lost. Shape ``[T]``.
        after: Median loss of the steps right after each step. Shape ``[T]``.
        edges: Upper edge of the loss band. Shape ``[T]``.
        is_over_band: Whether the loss that followed was over the band, in stretches of more than
            ten steps: in a long run a shorter one is chance. Shape ``[T]``.
        reasons: By number of a step that was not taken, why.
        why_scaled: By number of a step that was scaled, why, where the log has more than r to say.
        second_runs: By number of a step, what a second run of its batch showed.
        episodes: What `find_episodes` found; empty before.
    """

    series: StepSeries
    limit: float
    loss: np.ndarray
    after: np.ndarray
    edges: np.ndarray
    is_over_band: np.ndarray
    reasons: dict[int, str]
    why_scaled: dict[int, str]
    second_runs: dict[int, str]
    episodes: "list[Episode]"


@dataclass(frozen=True, slots=True)
class Episode:
    """Neighbouring steps that were touched or over the limit, and what the loss did after.

    Attributes:
        first, last: Indices of the first and the last step.
        peak: Largest r that was proposed, infinite where none was measured.
        effect: What the loss did.
    """

    first: int
    last: int
    peak: float
    effect: Effect


@lru_cache(maxsize=16)  # the page asks for it more than once
def gather(run: Run) -> Evidence:
    """Return what a run's episodes are judged by.

    Args:
        run: The run.

    Returns:
        The evidence.
    """
    series = step_series(run)
    limit = run.settings.get("max_normalized_step")
    loss = _known_loss(run, series)
    after, edges = aftermath(loss, np.arange(len(loss))), upper_band(loss, MIN_WIDTH)
    is_over_band = np.zeros(len(loss), dtype=bool)
    for first, last in spans(after > edges):
        is_over_band[first : last + 1] = last - first >= _LASTING
    return Evidence(
        series=series,
        limit=float(limit) if isinstance(limit, (int, float)) and limit > 0 else 1.0,
        loss=loss,
        after=after,
        edges=edges,
        is_over_band=is_over_band,
        reasons={step: why or "unknown" for step, why in _reasons(run, "skipped").items()},
        why_scaled={step: why for step, why in _reasons(run, "clipped").items() if why},
        second_runs=second_runs(run),
        episodes=[],
    )


def _reasons(run: Run, status: str) -> dict[int, str]:
    """Return for each step of a status the reason, empty where the log has none."""
    reasons, found = run.steps.get("reason"), run.steps.get("status")
    if reasons is None or found is None:
        return {}
    return {
        int(run.steps["step"][at]): cause_of(str(reasons[at] or ""))
        for at in np.flatnonzero(found == status)
    }


def cause_of(reason: str) -> str:
    """Return the reason of a step's status in plain words.

    Args:
        reason: The reason in the log.

    Returns:
        The cause.
    """
    plain = re.sub(
        "the gradient is not finite: ([^;]+)", r"the gradient of \1 is not finite", reason
    )
    return without_second_run(plain)


def _known_loss(run: Run, series: StepSeries) -> np.ndarray:
    """Return the loss, infinite where the log says that it was NaN. Shape ``[T]``."""
    if run.nan_losses is None:
        return lost_is_infinite(series.loss)
    is_nan = np.isnan(series.loss) & np.isin(series.step, list(run.nan_losses))
    return np.where(is_nan, np.inf, series.loss)


def find_episodes(evidence: Evidence) -> list[Episode]:
    """Return the stretches of steps that were touched or over the limit, in order.

    Args:
        evidence: The run's evidence.

    Returns:
        The stretches; steps at most ten apart are in one.
    """
    if evidence.episodes:
        return evidence.episodes
    series = evidence.series
    is_over = series.intervened | (series.proposed > evidence.limit * (1 + TOLERANCE))
    stretches = spans(is_over, _JOINED_GAP)
    ends = [first + 1 for first, _ in stretches[1:]] + [len(evidence.loss)]
    peaks = [_peak_of(series.proposed[first : last + 1]) for first, last in stretches]
    judged = set(np.argsort(peaks, kind="stable")[-_MAX_JUDGED:].tolist())
    known = np.flatnonzero(~np.isnan(evidence.loss))
    for place, (first, last) in enumerate(stretches):
        effect = Effect("unknown")
        if place in judged:
            effect = effect_of(evidence.loss, first, last, ends[place], known)
        evidence.episodes.append(Episode(first, last, peaks[place], effect))
    return evidence.episodes


def _peak_of(proposed: np.ndarray) -> float:
    known = proposed[~np.isnan(proposed)]
    return float(known.max()) if len(known) else np.inf
