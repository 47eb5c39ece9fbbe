"""Say in words what happened in a run, from its log alone."""

from dataclasses import dataclass

import numpy as np

from safestep.plots.rates import say_cost
from safestep.plots.wording import count, number, sentence
from safestep.report.drift import drifted_workers
from safestep.report.episodes import is_quiet, say_lost, tell, tell_healthy
from safestep.report.evidence import Evidence, cause_of, find_episodes, gather
from safestep.report.finding import Tone
from safestep.report.findings import drifted, find
from safestep.report.gradient import tell_gradient
from safestep.report.levels import course
from safestep.report.second_runs import tell_second_runs
from safestep.runlog.reader import Run
from safestep.runlog.series import FEW, removed_area

MAX_EPISODES = 5  # told one by one; the others are counted
_MAX_HEADLINES = 3
_MAX_ROLLBACKS = 3  # told one by one


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happened, in words.

    Attributes:
        tone: "good" (nothing happened, or it was caught), "warn" (worth a look) or "bad" (harm).
        headline: The one to three gravest findings and what to do about them, or that all is well.
        sentences: The story, in the order of the steps.
    """

    tone: Tone
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
    workers = drifted_workers(run)
    if not len(evidence.series.step):
        drift = drifted(run)
        headline = drift.told if drift else "The log holds no step yet."
        return Verdict("warn", headline, workers[1:] + _closing(run, evidence))
    findings = find(run, evidence)
    tones = {finding.tone for finding in findings}
    tone: Tone = "bad" if "bad" in tones else "warn" if "warn" in tones else "good"
    if tone == "good" and evidence.series.unmeasured.any():
        tone = "warn"
    told = findings[:_MAX_HEADLINES]
    headline = " ".join(finding.told for finding in told)
    is_told = {finding.text for finding in told}
    others = [text for text in (*workers, *tell_gradient(run)) if text not in is_told]
    course = _loss_course(evidence, headline)
    return Verdict(tone, headline, _story(evidence) + others + course + _closing(run, evidence))


def _story(evidence: Evidence) -> list[str]:
    """Return healthy stretches and the worst episodes in turn, and count the episodes left out."""
    episodes = find_episodes(evidence)
    worst = sorted(episodes, key=lambda e: (not e.effect.has_risen, -e.peak))[:MAX_EPISODES]
    sentences, start, left_out, is_told = [], 0, [], False
    for episode in episodes:
        if episode not in worst:
            left_out.append(episode)
            continue
        if episode.first > start and not left_out:
            last = episode.first - 1
            sentences.append(tell_healthy(evidence, start, last, is_told=is_told))
        sentences.append(tell(evidence, episode))
        start, is_told = episode.last + 1, episode.effect.has_risen
    if left_out:
        peak = max(episode.peak for episode in left_out)
        how_many = count(len(left_out), "milder episode")
        sentences.append(sentence(f"{how_many} besides, r <= {number(peak)}"))
    elif start < len(evidence.series.step) and (start or not is_quiet(evidence)):
        last = len(evidence.series.step) - 1
        sentences.append(tell_healthy(evidence, start, last, is_told=is_told))
    return sentences


def _loss_course(evidence: Evidence, headline: str) -> list[str]:
    """Return where the loss began and ended, if the headline does not, and where not finite."""
    known, lost = np.flatnonzero(np.isfinite(evidence.loss)), say_lost(evidence)
    if len(known) < 2:
        return [sentence(f"the loss was {lost}")] if lost else []
    first, last = (number(float(evidence.loss[known[at]])) for at in (0, -1))
    if lost and np.isinf(evidence.loss[~np.isnan(evidence.loss)][-1]):
        step = evidence.series.step[known[-1]]
        return [sentence(f"the loss went from {first} to {last} at step {step}, and was {lost}")]
    ends = course(evidence.loss)
    if ends:
        levels = f"from {number(ends[0])} to {number(ends[1])}"
        how = "medians of the first and the last tenth of the steps"
        sentences = [sentence(f"the loss went {levels} ({how})")] * (levels not in headline)
    else:
        sentences = [sentence(f"the loss went from {first} to {last}")]
    if lost:
        sentences.append(sentence(f"the loss was {lost}"))
    return sentences


def _closing(run: Run, evidence: Evidence) -> list[str]:
    """Return what is true of the whole run."""
    series = evidence.series
    sentences = tell_second_runs(evidence.second_runs, int(series.intervened.sum()))
    unmeasured = int(series.unmeasured.sum())
    if unmeasured:
        status, reasons = run.steps["status"], run.steps.get("reason")
        first = reasons[np.flatnonzero(status == "unmeasured")[0]] if reasons is not None else None
        what = f"{count(unmeasured, 'step')} could not be measured and passed unguarded"
        sentences.append(sentence(f"{what} ({cause_of(str(first or 'reason unknown'))})"))
    removed = removed_area(series)
    if removed >= 0.0005 and series.intervened.mean() > FEW:
        mean = float(np.nanmean(series.learning_rate))
        ends = f"from {number(mean)} to {number(mean * (1 - removed))}"
        sentences.append(sentence(f"the guard lowered the mean learning rate {ends}"))
    if np.isfinite(series.seconds).any():
        sentences.append(sentence(say_cost(run)))
    resumed = sum(event.get("name") == "resumed" for event in run.events)
    if resumed:
        sentences.append(sentence(f"the run was resumed {count(resumed, 'time')}"))
    sentences += _rolled_back(run)
    sentences += [sentence(f"{what} of the log") for what in run.left_out]
    if run.torn:
        sentences.append(sentence("the last line of the log is cut short and was left out"))
    return sentences


def _rolled_back(run: Run) -> list[str]:
    """Return when the run went back, and why; of the steps made twice, the second ones are told."""
    told = [str(event.get("message")) for event in run.events if event.get("name") == "rolled back"]
    sentences = [sentence(f"the run was rolled back {text}") for text in told[:_MAX_ROLLBACKS]]
    if len(told) > _MAX_ROLLBACKS:
        more = count(len(told) - _MAX_ROLLBACKS, "more time")
        sentences.append(sentence(f"it was rolled back {more}"))
    return sentences
