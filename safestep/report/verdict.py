"""Say in words what happened in a run, from its log alone."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from safestep.plots.wording import count, number, sentence
from safestep.report.episodes import Evidence, find_episodes, gather, tell, tell_healthy
from safestep.report.regimes import TOLERANCE, name_regimes
from safestep.runlog.reader import Run
from safestep.runlog.series import StepSeries, removed_area, scalar

MAX_EPISODES = 5  # told one by one; the others are counted
_MAX_WORKER_EVENTS = 5
_OFTEN_SCALED = 0.5  # share of steps from which on it is no longer an accident
_OFTEN = 10  # flags within twenty records; alike workers have one in a hundred steps


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happened, in words.

    Attributes:
        tone: "good" (nothing happened, or it was caught), "warn" (worth a look) or "bad" (harm).
        headline: One sentence.
        sentences: The story, in the order of the steps.
    """

    tone: Literal["good", "warn", "bad"]
    headline: str
    sentences: list[str]


def write_verdict(run: Run) -> Verdict:
    """Return what happened in a run.

    Args:
        run: The run.

    Returns:
        Headline and story.
    """
    evidence = gather(run)
    series = evidence.series
    workers, ends = _workers(run), [*_loss_course(evidence), *_closing(run, series)]
    if not len(series.step):
        headline = "The log holds no step" + (" but what its workers say." if workers else " yet.")
        return Verdict("warn", headline, workers + ends)
    harmful = name_regimes(run, series)["harmful"]
    is_doubtful = workers or series.unmeasured.any() or evidence.is_over_band.any()
    is_doubtful = is_doubtful or series.intervened.mean() > _OFTEN_SCALED
    tone = "bad" if harmful.any() else "warn" if is_doubtful else "good"
    return Verdict(tone, _headline(evidence, harmful), _story(evidence) + workers + ends)


def _headline(evidence: Evidence, harmful: np.ndarray) -> str:
    series = evidence.series
    total = count(len(series.step), "step")
    touched = int(series.intervened.sum())
    if harmful.any():
        first = series.step[harmful.argmax()]
        return (
            f"Harmed: the loss rose after {harmful.sum():,} of {total} with r over 1, "
            f"first after step {first}."
        )
    if touched:
        text = f"the guard stepped in at {touched:,} of {total}"
        is_high = evidence.is_over_band.any()
        return sentence(f"{text}, yet the loss rose" if is_high else f"Protected: {text}")
    if not np.isfinite(series.proposed).any():
        return f"Not measured: none of {total} has an r."
    over = int((series.proposed > 1 + TOLERANCE).sum())
    if over:
        return f"Unharmed: r was over 1 at {over:,} of {total}, and the loss held."
    peak = number(float(np.nanmax(series.proposed)))
    if evidence.is_over_band.any():
        return f"Inside the radius (r <= {peak}) in all of {total}, yet the loss rose."
    return f"Healthy: {total}, r <= {peak}, none touched."


def _story(evidence: Evidence) -> list[str]:
    """Return healthy stretches and the worst episodes in turn, and count the episodes left out."""
    episodes = find_episodes(evidence)
    worst = sorted(episodes, key=lambda episode: -episode.peak)[:MAX_EPISODES]
    sentences, start, left_out = [], 0, []
    for episode in episodes:
        if episode not in worst:
            left_out.append(episode)
            continue
        if episode.first > start and not left_out:
            sentences.append(tell_healthy(evidence, start, episode.first - 1))
        sentences.append(tell(evidence, episode))
        start = episode.last + 1
    if left_out:
        peak = max(episode.peak for episode in left_out)
        how_many = count(len(left_out), "milder episode")
        sentences.append(sentence(f"{how_many} besides, r <= {number(peak)}"))
    elif start < len(evidence.series.step):
        sentences.append(tell_healthy(evidence, start, len(evidence.series.step) - 1))
    return sentences


def _workers(run: Run) -> list[str]:
    """Return what the watch over the workers found first of each, else who often stood out."""
    found: dict[object, str] = {}
    for event in run.events:
        if event.get("name") == "worker":
            message = str(event.get("message"))
            found.setdefault(event.get("rank"), sentence(f"worker drifted: {message}"))
    sentences = list(found.values()) or _standing_out(run)
    if len(sentences) > _MAX_WORKER_EVENTS:
        more = count(len(sentences) - _MAX_WORKER_EVENTS, "more worker")
        sentences = [*sentences[:_MAX_WORKER_EVENTS], sentence(f"{more} drifted")]
    return sentences


def _standing_out(run: Run) -> list[str]:
    """Return the workers that stood out at most steps of some stretch of twenty records."""
    outlier, sentences = scalar(run, "outlier"), []
    for worker in np.unique(outlier[np.isfinite(outlier)])[:1000]:
        flags = np.flatnonzero(outlier == worker)
        dense = np.flatnonzero(flags[_OFTEN - 1 :] - flags[: 1 - _OFTEN] < 2 * _OFTEN)
        if len(dense):
            since = run.workers["step"][flags[dense[0]]]
            share = (outlier[flags[dense[0]] :] == worker).mean()
            what = f"worker {worker:.0f} stood out from step {since} on"
            sentences.append(sentence(f"{what}, at {share:.0%} of the measured steps"))
    return sentences


def _loss_course(evidence: Evidence) -> list[str]:
    """Return where the loss began and ended."""
    known = np.flatnonzero(np.isfinite(evidence.loss))
    if len(known) < 2:
        return []
    first, last = (number(float(evidence.loss[known[at]])) for at in (0, -1))
    text = f"the loss went from {first} to {last}"
    if np.isinf(evidence.loss[-1]):
        text += f"; it is not finite after step {evidence.series.step[known[-1]]}"
    return [sentence(text)]


def _closing(run: Run, series: StepSeries) -> list[str]:
    """Return what is true of the whole run."""
    sentences = []
    unmeasured = int(series.unmeasured.sum())
    if unmeasured:
        status, reasons = run.steps["status"], run.steps.get("reason")
        first = reasons[np.flatnonzero(status == "unmeasured")[0]] if reasons is not None else None
        what = f"{count(unmeasured, 'step')} could not be measured and passed unguarded"
        sentences.append(sentence(f"{what} ({first or 'reason unknown'})"))
    if len(series.step) and series.clipped.mean() > _OFTEN_SCALED:
        r = number(float(np.nanmedian(series.proposed[series.clipped])))
        what = f"more than half of the steps were scaled, at a median r of {r}"
        sentences.append(sentence(f"{what}: the learning rate is too high for this run"))
    removed = removed_area(series)
    if removed >= 0.0005:
        sentences.append(sentence(f"the guard removed {removed:.1%} of the learning-rate area"))
    if np.isfinite(series.seconds).any():
        milliseconds = 1e3 * float(np.nanmedian(series.seconds))
        sentences.append(sentence(f"it took {number(milliseconds)} ms a step in the median"))
    resumed = sum(event.get("name") == "resumed" for event in run.events)
    if resumed:
        sentences.append(sentence(f"the run was resumed {count(resumed, 'time')}"))
    if run.torn:
        sentences.append(sentence("the last line of the log is cut short and was left out"))
    return sentences
