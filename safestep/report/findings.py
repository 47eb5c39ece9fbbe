"""What the page's headline may say about a run: one function a finding, the gravest first."""

import re
from dataclasses import replace

import numpy as np

from safestep.plots.wording import count, number, sentence
from safestep.report.drift import drifted_workers
from safestep.report.episodes import rate_jump
from safestep.report.evidence import Evidence, cause_of, find_episodes
from safestep.report.finding import Finding, Judge, bad_batch, is_over, touched
from safestep.report.gradient import wrong_gradient
from safestep.report.rates import (
    OFTEN,
    safe_learning_rate,
    say_course,
    too_cold,
    too_hot,
    would_have_stayed,
)
from safestep.report.rises import RISES, tell_worst
from safestep.runlog.reader import Run
from safestep.runlog.series import worker_noun


def find(run: Run, evidence: Evidence) -> list[Finding]:
    """Return what was found in a run that has steps, the gravest first, at least one.

    Args:
        run: The run.
        evidence: What its steps are judged by.

    Returns:
        The findings; a later one never repeats an earlier one.
    """
    problems = [drifted(run), wrong_gradient(run), *(judge(run, evidence) for judge in _PROBLEMS)]
    rises = [finding for judge in RISES if (finding := judge(run, evidence))]
    rises = rises[: 1 if rises and rises[0].is_explained else 2]
    if len(rises) > 1 and rises[1].advice:  # the second says why, and so what to do
        rises[0] = replace(rises[0], advice="")
    found = [finding for finding in problems if finding] + rises
    found = sorted(found, key=lambda finding: finding.tone != "bad")
    return found or [_calm(run, evidence)]


def drifted(run: Run) -> Finding | None:
    """Return the worker or replica that was off first."""
    sentences = drifted_workers(run)
    if not sentences:
        return None
    if "replica " in sentences[0].lower():
        return Finding("warn", sentences[0], "Restart it from a checkpoint.")
    device = " and its device" * (worker_noun(run) == "worker")
    return Finding("warn", sentences[0], f"Look at its data{device}.")


def _not_taken(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether most steps were not taken at all."""
    skipped = int(evidence.series.skipped.sum())
    if skipped <= OFTEN * len(evidence.series.step):
        return None
    reason = next(iter(evidence.reasons.values()), "reason unknown")
    text = f"{skipped:,} of {count(len(evidence.series.step), 'step')} were not taken ({reason})."
    return Finding("bad", f"The run stands still: {text}", bad_batch(evidence))


def _unmeasured(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether most steps passed unguarded, of those whose loss was a number."""
    series = evidence.series
    is_known = np.isfinite(series.proposed) | series.skipped | np.isinf(evidence.loss)
    unmeasured = int((~is_known).sum())
    if unmeasured <= OFTEN * len(series.step):
        return None
    reasons, status = run.steps.get("reason"), run.steps.get("status")
    at = np.flatnonzero(status == "unmeasured") if status is not None else []
    why = (
        f" ({re.split('[;.] ', cause_of(str(reasons[at[0]])))[0]})"  # the whole one stands below
        if reasons is not None and len(at) and reasons[at[0]]
        else ""
    )
    total = count(len(series.step), "step")
    none = unmeasured == len(series.step)
    what = f"none of {total} has an r" if none else f"{unmeasured:,} of {total} have no r"
    advice = "Look the reason up under Troubleshooting in the README." if why else ""
    return Finding("warn", f"Not guarded: {what}{why}.", advice)


_PROBLEMS: tuple[Judge, ...] = (_not_taken, too_hot, _unmeasured, too_cold)


def _calm(run: Run, evidence: Evidence) -> Finding:
    """Return what the guard did, or how far the limit was, where nothing is wrong."""
    series, total = evidence.series, count(len(evidence.series.step), "step")
    if series.intervened.any():
        return _protected(evidence)
    peak = number(float(np.nanmax(series.proposed)))
    over = int(is_over(evidence).sum())
    if not over:
        text = f"Healthy: {total}, r <= {peak}, none touched{say_course(evidence)}."
        return Finding("good", text)
    text = f"Unharmed: r was over the limit at {over:,} of {total} (at most {peak})"
    safe = safe_learning_rate(evidence)
    is_often = over > OFTEN * len(series.step) and safe is not None
    hint = (
        f"; a learning rate of {would_have_stayed(safe)}" if is_often and safe is not None else ""
    )
    tone = "warn" if is_often else "good"
    return Finding(tone, f"{text}, which were let through; {_held(evidence)}{hint}.")


def _protected(evidence: Evidence) -> Finding:
    """Return what the guard did in a run whose loss is well, and why."""
    episodes = find_episodes(evidence)
    risen = [episode for episode in episodes if episode.effect.has_risen]
    end = tell_worst(evidence, risen) if risen else _held(evidence)
    clipped = np.where(evidence.series.clipped, evidence.series.proposed, -np.inf)
    at = int(np.nan_to_num(clipped, nan=-np.inf).argmax())
    longest, advice = "", bad_batch(evidence)
    if np.isfinite(clipped[at]):
        which = "the longest at " if evidence.series.clipped.sum() > 1 else ""
        longest = f"{which}step {evidence.series.step[at]}: r = {number(float(clipped[at]))}"
        jump = rate_jump(evidence, next(e for e in episodes if e.first <= at <= e.last))
        longest += f", {jump}" * bool(jump)
        look = f"Look at what raised the learning rate at step {evidence.series.step[at]}."
        advice = f"{look * bool(jump)} {advice}".strip()
    text = sentence(f"protected: the guard {touched(evidence, longest)}; {end}")
    return Finding("good", text, advice)


def _held(evidence: Evidence) -> str:
    """Return what can be said of the loss where no episode made it rise."""
    if np.isnan(evidence.loss).all():
        return "the log holds no loss to judge by"
    kinds = [episode.effect.kind for episode in find_episodes(evidence)]
    if "unclear" in kinds:
        return "the loss did not rise beyond its noise"
    return "the loss held" if "held" in kinds else "no sign that the loss rose"
