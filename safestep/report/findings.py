"""What the page's headline may say about a run: one function a finding, the gravest first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from safestep.plots.wording import count, number, percent, sentence
from safestep.report.bands import TOLERANCE
from safestep.report.drift import drifted_workers
from safestep.report.episodes import Episode, Evidence, find_episodes, loss_effect, say_lost
from safestep.report.levels import last_rise
from safestep.runlog.measured_how import how_measured
from safestep.runlog.reader import Run

OFTEN = 0.5  # share of steps from which on something is no accident
_FAR_UNDER = 0.01  # of the limit: an r so small leaves room for a larger learning rate
_MOST = 0.95  # share of the steps that a suggested learning rate would have kept under the limit

Tone = Literal["good", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence of the headline.

    Attributes:
        tone: How grave it is: "good", "warn" or "bad".
        text: The sentence.
        is_explained: Whether it says why; if not, the next finding about the loss is told too.
    """

    tone: Tone
    text: str
    is_explained: bool = True


def find(run: Run, evidence: Evidence) -> list[Finding]:
    """Return what was found in a run that has steps, the gravest first, at least one.

    Args:
        run: The run.
        evidence: What its steps are judged by.

    Returns:
        The findings; a later one never repeats an earlier one.
    """
    problems = [finding for judge in _PROBLEMS if (finding := judge(run, evidence))]
    rises = [finding for judge in _RISES if (finding := judge(run, evidence))]
    rises = rises[: 1 if rises and rises[0].is_explained else 2]
    found = sorted(problems + rises, key=lambda finding: finding.tone != "bad")
    return found or [_calm(run, evidence)]


def _lost(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss is not finite at the end."""
    loss, step = evidence.loss, evidence.series.step
    known = np.flatnonzero(~np.isnan(loss))
    if not len(known) or np.isfinite(loss[known[-1]]):
        return None
    finite = np.flatnonzero(np.isfinite(loss))
    if not len(finite):
        return Finding("bad", "Lost: the loss was never finite.")
    text = f"the loss is not finite after step {step[finite[-1]]}"
    cause = next((e for e in find_episodes(evidence)[::-1] if e.first <= finite[-1] + 1), None)
    is_near = cause is not None and finite[-1] - cause.last < 10 and np.isfinite(cause.peak)
    if cause is not None and is_near:
        taken = "was let through" if _is_let_through(evidence, cause) else "was scaled down"
        text += f", where an r of {number(cause.peak)} {taken}"
    return Finding("bad", sentence(f"lost: {text}"), is_explained=is_near)


def _harmed(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss rose after a step over the limit that was let through."""
    risen = [
        episode for episode in find_episodes(evidence)
        if episode.effect.has_risen and _is_let_through(evidence, episode)
    ]  # fmt: skip
    if not risen:
        return None
    return Finding("bad", sentence(f"harmed: {_worst(evidence, risen, 'was let through')}"))


def _not_saved(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss rose and stayed up although the guard stepped in."""
    risen = [episode for episode in find_episodes(evidence) if episode.effect.is_harm]
    risen = [episode for episode in risen if not _is_let_through(evidence, episode)]
    if not risen:
        return None
    told = _worst(evidence, risen, "was scaled down")
    return Finding("bad", f"The guard {_touched(evidence)}, yet {told}.")


def _risen(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss ended above its lowest level, whatever the cause."""
    rise = last_rise(evidence.loss)
    if rise is None:
        return None
    lowest, at, final = rise
    if np.isinf(final):  # `_lost` says it
        return None
    step = evidence.series.step[at]
    levels = f"{number(lowest)} (about step {step}) to {number(final)} at the end"
    over = int(_is_over(evidence).sum())
    let_through = int((_is_over(evidence) & ~evidence.series.intervened).sum())
    if let_through:
        text = f"Harmed: the loss rose from {levels}, with r over the limit at {over:,} steps"
        return Finding("bad", f"{text} that were let through.")
    if evidence.series.intervened.any():
        text = f"The guard {_touched(evidence)}, yet the loss rose from {levels}."
        return Finding("warn", text)
    return Finding("warn", f"No step was over the limit, yet the loss rose from {levels}.")


def _lost_for_a_while(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss was not finite at steps that were taken, and is finite again."""
    if not (np.isinf(evidence.loss) & ~evidence.series.skipped).any():
        return None
    return Finding("warn", sentence(f"the loss was {say_lost(evidence)}"))


def _drifted(run: Run, evidence: Evidence) -> Finding | None:
    """Return the worker or replica that was off first."""
    sentences = drifted_workers(run)
    return Finding("warn", sentences[0]) if sentences else None


def _not_taken(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether most steps were not taken at all."""
    skipped = int(evidence.series.skipped.sum())
    if skipped <= OFTEN * len(evidence.series.step):
        return None
    reason = next(iter(evidence.reasons.values()), "reason unknown")
    text = f"{skipped:,} of {count(len(evidence.series.step), 'step')} were not taken ({reason})."
    return Finding("bad", f"The run stands still: {text}")


def _too_hot(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether most steps had to be scaled down, and by how much the rate is too large."""
    series = evidence.series
    thirds = [part for part in np.array_split(series.clipped, 3) if len(part)]
    is_hot = max(part.mean() for part in thirds) > OFTEN
    if not is_hot or run.settings.get("action") == "set":
        return None
    safe, over = safe_learning_rate(evidence), series.proposed[series.clipped] / evidence.limit
    times = float(np.quantile(over[~np.isnan(over)], _MOST)) if np.isfinite(over).any() else np.inf
    if safe is not None:
        times = float(np.nanmedian(series.learning_rate[series.clipped])) / safe
    how_much = f"about {number(float(f'{times:.2g}'))} times " if np.isfinite(times) else ""
    text = f"The learning rate is {how_much}too large"
    if safe is not None:
        text += f": {_would_have_stayed(safe)}"
    done = f"the guard scaled down {int(series.clipped.sum()):,} of {len(series.step):,} steps"
    return Finding("warn", f"{text}; {done}.")


def _unmeasured(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether most steps passed unguarded."""
    series = evidence.series
    is_known = np.isfinite(series.proposed) | series.skipped
    unmeasured = int((~is_known).sum())
    if unmeasured <= OFTEN * len(series.step):
        return None
    reasons, status = run.steps.get("reason"), run.steps.get("status")
    at = np.flatnonzero(status == "unmeasured") if status is not None else []
    why = f" ({reasons[at[0]]})" if reasons is not None and len(at) and reasons[at[0]] else ""
    total = count(len(series.step), "step")
    none = unmeasured == len(series.step)
    what = f"none of {total} has an r" if none else f"{unmeasured:,} of {total} have no r"
    return Finding("warn", f"Not guarded: {what}{why}.")


def _too_cold(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether every step was far under the limit."""
    r = evidence.series.proposed
    r = r[np.isfinite(r)]
    if not len(r) or evidence.series.intervened.any() or run.settings.get("action") == "set":
        return None
    peak = float(np.quantile(r, 0.99))
    if not 0 < peak < _FAR_UNDER * evidence.limit:
        return None
    return Finding(
        "warn",
        f"r is far below the limit of {number(evidence.limit)} (99 % of the steps at or under "
        f"{number(peak)}): the learning rate could be larger.",
    )


# Of these the first that holds is told, since they explain the same rise.
_RISES: tuple[Callable[[Run, Evidence], Finding | None], ...] = (
    _lost, _harmed, _not_saved, _risen, _lost_for_a_while,
)  # fmt: skip
_PROBLEMS: tuple[Callable[[Run, Evidence], Finding | None], ...] = (
    _drifted, _not_taken, _too_hot, _unmeasured, _too_cold,
)  # fmt: skip


def safe_learning_rate(evidence: Evidence) -> float | None:
    """Return the learning rate that would have kept 95 % of the steps under the limit.

    It is a low quantile of learning rate x limit / r over the measured steps: r is proportional to
    the length of the step, and the length to the learning rate.

    Args:
        evidence: What the run's steps are judged by.

    Returns:
        The rate, None where the log does not tell.
    """
    series = evidence.series
    is_known = (series.proposed > 0) & (series.learning_rate > 0)
    is_known &= np.isfinite(series.proposed) & np.isfinite(series.learning_rate)
    if not is_known.any():
        return None
    rates = series.learning_rate[is_known] * evidence.limit / series.proposed[is_known]
    return float(np.quantile(rates, 1 - _MOST))


def _calm(run: Run, evidence: Evidence) -> Finding:
    """Return what the guard did, or how far the limit was, where nothing is wrong."""
    series, total = evidence.series, count(len(evidence.series.step), "step")
    episodes = find_episodes(evidence)
    if series.intervened.any():
        risen = [episode for episode in episodes if episode.effect.has_risen]
        end = f"{_worst(evidence, risen, 'was scaled down')}" if risen else _held(evidence)
        return Finding("good", sentence(f"protected: the guard {_touched(evidence)}; {end}"))
    peak = number(float(np.nanmax(series.proposed)))
    over = int(_is_over(evidence).sum())
    if not over:
        how = " (predicted or measured)" if how_measured(run)["predicted"].any() else ""
        return Finding("good", f"Healthy: {total}, r <= {peak}{how}, none touched.")
    text = f"Unharmed: r was over the limit at {over:,} of {total} (at most {peak})"
    safe = safe_learning_rate(evidence)
    is_often = over > OFTEN * len(series.step) and safe is not None
    hint = f"; {_would_have_stayed(safe)}" if is_often and safe is not None else ""
    tone = "warn" if is_often else "good"
    return Finding(tone, f"{text}, which were let through; {_held(evidence)}{hint}.")


def _would_have_stayed(rate: float) -> str:
    return f"{number(rate)} would have stayed under the limit at {percent(_MOST)} of the steps"


def _held(evidence: Evidence) -> str:
    """Return what can be said of the loss where no episode made it rise."""
    if np.isnan(evidence.loss).all():
        return "the log holds no loss to judge by"
    kinds = [episode.effect.kind for episode in find_episodes(evidence)]
    if "unclear" in kinds:
        return "the loss did not rise beyond its noise"
    return "the loss held" if "held" in kinds else "no sign that the loss rose"


def _is_over(evidence: Evidence) -> np.ndarray:
    return evidence.series.proposed > evidence.limit * (1 + TOLERANCE)


def _is_let_through(evidence: Evidence, episode: Episode) -> bool:
    """Return whether any step of an episode was taken over the limit."""
    taken = evidence.series.taken[episode.first : episode.last + 1]
    return bool((taken > evidence.limit * (1 + TOLERANCE)).any())


def _touched(evidence: Evidence) -> str:
    """Return how many steps the guard scaled down or left out, and why."""
    series, facts = evidence.series, []
    if series.clipped.any():
        facts.append(f"scaled down {int(series.clipped.sum()):,}")
    why = ""
    if series.skipped.any():
        facts.append(f"did not take {int(series.skipped.sum()):,}")
        at, reason = next(iter(evidence.reasons.items()), (None, "reason unknown"))
        look = f"; look at the batch of step {at}" if "not finite" in reason else ""
        why = f" ({reason}{look})"
    return f"{' and '.join(facts)} of {count(len(series.step), 'step')}{why}"


def _worst(evidence: Evidence, episodes: list[Episode], what: str) -> str:
    """Return the effect of the episode that did most to the loss, and how many others there are."""
    worst = max(episodes, key=lambda e: (e.effect.is_harm, e.effect.peak - e.effect.before))
    r = f", where an r of {number(worst.peak)} {what}," if np.isfinite(worst.peak) else ""
    more = f" ({count(len(episodes) - 1, 'more rise')} like it)" if len(episodes) > 1 else ""
    step = evidence.series.step[worst.first]
    return f"after step {step}{r} the {loss_effect(evidence, worst)}{more}"
