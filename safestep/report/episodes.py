"""The stretches of a run where the guard stepped in or r was over the limit, in words."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from safestep.plots.wording import count, number, sentence, steps_between
from safestep.report.bands import (
    AFTERMATH,
    MIN_WIDTH,
    TOLERANCE,
    aftermath,
    lost_is_infinite,
    upper_band,
)
from safestep.report.levels import Effect, effect_of
from safestep.runlog.reader import Run
from safestep.runlog.series import StepSeries, spans, step_series

_JOINED_GAP = 10  # touched steps so near each other are one story
_LOOKBACK = 20  # steps before an episode that say what was usual
_LASTING = 10  # so many steps over the loss band, or under it again, are no chance
_MAX_JUDGED = 2000  # episodes whose loss is looked at, those of the largest r
_MIN_RATE_JUMP = 1.5  # a learning rate so many times the usual one is named as the cause


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
        episodes: What `find_episodes` found; empty before.
    """

    series: StepSeries
    limit: float
    loss: np.ndarray
    after: np.ndarray
    edges: np.ndarray
    is_over_band: np.ndarray
    reasons: dict[int, str]
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
    status, reasons = run.steps.get("status"), run.steps.get("reason")
    skipped = np.flatnonzero(status == "skipped") if status is not None else []
    return Evidence(
        series=series,
        limit=float(limit) if isinstance(limit, (int, float)) and limit > 0 else 1.0,
        loss=loss,
        after=after,
        edges=edges,
        is_over_band=is_over_band,
        reasons={} if reasons is None else {
            int(run.steps["step"][at]): str(reasons[at] or "unknown") for at in skipped
        },
        episodes=[],
    )  # fmt: skip


def _known_loss(run: Run, series: StepSeries) -> np.ndarray:
    """Return the loss, infinite where the log says that it was NaN. Shape ``[T]``."""
    if run.nan_losses is None:
        return lost_is_infinite(series.loss)
    is_nan = np.isnan(series.loss) & np.isin(series.step, list(run.nan_losses))
    return np.where(is_nan, np.inf, series.loss)


def say_lost(evidence: Evidence, first: int = 0, last: int | None = None) -> str:
    """Return at which steps of a stretch the loss was no finite number.

    Args:
        evidence: The run's evidence.
        first: First index.
        last: Last index; the run's end without.

    Returns:
        Words such as "not a number from step 30 on"; empty where it was finite throughout.
    """
    end = len(evidence.loss) if last is None else last + 1
    lost = spans(np.isinf(evidence.loss[first:end]))
    if not lost:
        return ""
    begin, until = (first + at for at in lost[0])
    is_nan = np.isnan(evidence.series.loss[first:end][np.isinf(evidence.loss[first:end])]).all()
    where = f"at {_where(evidence, begin, until)}"
    if until == len(evidence.loss) - 1:
        where = f"from step {evidence.series.step[begin]} on"
    more = f" and at {count(len(lost) - 1, 'more stretch')}" if len(lost) > 1 else ""
    return f"not {'a number' if is_nan else 'finite'} {where}{more}"


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


def tell_healthy(evidence: Evidence, first: int, last: int, *, is_told: bool = False) -> str:
    """Return a stretch inside the limit in a sentence; it is healthy if its loss held as well.

    Args:
        evidence: The run's evidence.
        first: First index.
        last: Last index.
        is_told: Whether the episode before was said to have raised the loss.

    Returns:
        The sentence.
    """
    r = evidence.series.proposed[first : last + 1]
    where = _where(evidence, first, last)
    if not np.isfinite(r).any():
        return sentence(f"{where} not measured")
    peak = f"r <= {number(float(np.nanmax(r)))}{' where measured' * bool(np.isnan(r).any())}"
    is_followed = last + 1 < len(evidence.loss)  # what follows the last steps is the next episode
    stop = last + 1 - AFTERMATH * is_followed
    over = evidence.is_over_band[first:stop] & np.isfinite(evidence.after[first:stop])
    over, lost = np.flatnonzero(over), say_lost(evidence, first, last)
    if is_told:
        return sentence(f"{where} within the radius ({peak})")
    if lost:
        return sentence(f"{where} within the radius ({peak}), but the loss was {lost}")
    if not len(over):
        return sentence(f"{where} healthy ({peak})")
    from_step = evidence.series.step[first + over[0]]
    return sentence(
        f"{where} within the radius ({peak}), but the loss was above its usual range after "
        f"{count(len(over), 'step')}, first at step {from_step}"
    )


def tell(evidence: Evidence, episode: Episode) -> str:
    """Return an episode in a sentence: what, where, why, how far, and what the loss did.

    Args:
        evidence: The run's evidence.
        episode: The episode.

    Returns:
        The sentence.
    """
    series, inside = evidence.series, slice(episode.first, episode.last + 1)
    clipped, skipped = series.clipped[inside], series.skipped[inside]
    touched = int((clipped | skipped).sum())
    what = count(touched, "intervention") if touched else "let through"
    facts = [_rate_jump(evidence, episode), _peak(evidence, episode)]
    if clipped.any():
        least = float(series.scale[inside][clipped].min())
        facts.append(f"scaled by {number(least)}{' or more' if clipped.sum() > 1 else ''}")
    if skipped.any():
        facts.append(_not_taken(evidence, series.step[inside][skipped]))
    story = ", ".join(fact for fact in facts if fact)
    where = _where(evidence, episode.first, episode.last)
    return sentence(f"{what} at {where}: {story}; {loss_effect(evidence, episode)}")


def _where(evidence: Evidence, first: int, last: int) -> str:
    return steps_between(*(int(evidence.series.step[at]) for at in (first, last)))


def _peak(evidence: Evidence, episode: Episode) -> str:
    if not np.isfinite(evidence.series.proposed[episode.first : episode.last + 1]).any():
        return ""
    return f"r {'=' if episode.first == episode.last else '<='} {number(episode.peak)}"


def _rate_jump(evidence: Evidence, episode: Episode) -> str:
    """Return by how much the learning rate jumped, if it did: the usual cause."""
    rates = evidence.series.learning_rate
    usual = rates[max(0, episode.first - _LOOKBACK) : episode.first]
    if not np.isfinite(usual).any() or not np.nanmedian(usual) > 0:
        return ""
    highest = rates[episode.first : episode.last + 1]
    if not np.isfinite(highest).any():
        return ""
    jump = float(np.nanmax(highest) / np.nanmedian(usual))
    return f"learning rate x{number(jump)}" if jump >= _MIN_RATE_JUMP else ""


def _not_taken(evidence: Evidence, steps: np.ndarray) -> str:
    reason = evidence.reasons.get(int(steps[0]), "unknown")
    what = "not taken" if len(steps) == 1 else f"{count(len(steps), 'step')} not taken"
    return f"{what} ({reason})"


def loss_effect(evidence: Evidence, episode: Episode) -> str:
    """Return in words what the loss did after an episode, with its levels before and after.

    Args:
        evidence: The run's evidence.
        episode: The episode.

    Returns:
        A clause.
    """
    effect, step = episode.effect, evidence.series.step
    before, after = number(effect.before), number(effect.after)
    if np.isnan(evidence.loss).all():
        return "the log holds no loss"
    if effect.kind == "unknown":
        return "too few losses around it to judge"
    if effect.kind == "held":
        return f"loss unaffected ({before} before, {after} after)"
    if effect.kind == "unclear":
        levels = f"{before} before, {after} after, give or take {number(effect.give)}"
        return f"no rise of the loss beyond its noise ({levels})"
    if effect.kind == "lost":
        rose = f"rose from {before} to {number(effect.peak)}" * bool(np.isfinite(effect.peak))
        rose = rose or f"was {before}"
        return f"loss {rose} and was not finite from step {step[effect.until]} on"
    rose = f"loss rose from {before} to {number(effect.peak)}"
    if np.isinf(effect.peak):
        rose = f"loss was {before} before and not finite for a while"
    if effect.back is not None:
        return f"{rose}, and was back at {after} by step {step[effect.back]}"
    return f"{rose} and stayed up ({after} by step {step[effect.until]})"
