"""The stretches of a run where the guard stepped in or r was over the limit, in words."""

from collections import Counter

import numpy as np

from safestep.plots.wording import count, listed, number, sentence, steps_between
from safestep.report.bands import AFTERMATH
from safestep.report.evidence import Episode, Evidence, find_episodes
from safestep.runlog.series import spans

_LOOKBACK = 20  # steps before an episode that say what was usual
_MAX_STRETCHES = 3  # named one by one
_MIN_RATE_JUMP = 1.5  # a learning rate so many times the usual one is named as the cause


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
    is_nan = np.isnan(evidence.series.loss[first:end][np.isinf(evidence.loss[first:end])]).all()
    places = [_when(evidence, first + begin, first + until) for begin, until in lost]
    told, more = places[:_MAX_STRETCHES], len(places) - _MAX_STRETCHES
    told += [f"at {count(more, 'more stretch')}"] if more > 0 else []
    return f"not {'a number' if is_nan else 'finite'} {listed(told)}"


def _when(evidence: Evidence, first: int, last: int) -> str:
    """Return where a stretch is, as "from step 30 on" where it reaches the run's end."""
    if last == len(evidence.loss) - 1:
        return f"from step {evidence.series.step[first]} on"
    return f"at {_where(evidence, first, last)}"


def is_quiet(evidence: Evidence) -> bool:
    """Return whether a run has nothing to tell but its largest r: no episode, no odd loss.

    Args:
        evidence: The run's evidence.

    Returns:
        The answer.
    """
    has_odd_loss = evidence.is_over_band.any() or np.isinf(evidence.loss).any()
    return not find_episodes(evidence) and not has_odd_loss


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
    stop = max(first, last + 1 - AFTERMATH * is_followed)
    over = evidence.is_over_band[first:stop] & np.isfinite(evidence.after[first:stop])
    over, lost = np.flatnonzero(over), say_lost(evidence, first, last)
    inside = f"{where} inside the limit ({peak})"
    if lost and not is_told:
        return sentence(f"{inside}, but the loss was {lost}")
    if is_told or not len(over):
        return sentence(inside)
    begin = first + over[0] + 1  # the first of the values that followed which is itself so high
    is_high = evidence.loss[begin : last + 1] > evidence.edges[begin : last + 1]
    from_step = evidence.series.step[begin + int(is_high[:AFTERMATH].argmax())]
    high = count(max(1, int(is_high.sum())), "step")
    return sentence(
        f"{inside}, but the loss was above its usual range from step {from_step} on, at {high}"
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
    facts = [rate_jump(evidence, episode), _peak(evidence, episode)]
    if clipped.any():
        factors = series.scale[inside][clipped]
        ends = dict.fromkeys(number(float(end)) for end in (factors.min(), factors.max()))
        facts.append(f"scaled by {' to '.join(ends)}")
        facts.append(_why_scaled(evidence, series.step[inside][clipped]))
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


def rate_jump(evidence: Evidence, episode: Episode) -> str:
    """Return by how much the learning rate jumped, if it did: the usual cause.

    Args:
        evidence: The run's evidence.
        episode: The episode.

    Returns:
        Words such as "learning rate x1,000", with the steps where these are not the whole episode;
        empty where it did not jump.
    """
    rates = evidence.series.learning_rate
    usual = rates[max(0, episode.first - _LOOKBACK) : episode.first]
    if not np.isfinite(usual).any() or not np.nanmedian(usual) > 0:
        return ""
    times = rates[episode.first : episode.last + 1] / np.nanmedian(usual)
    jumps = spans(times >= _MIN_RATE_JUMP)
    if not jumps:
        return ""
    first, last = jumps[0][0], jumps[-1][1]
    is_partial = (first, last) != (0, len(times) - 1)
    where = f" at {_where(evidence, episode.first + first, episode.first + last)}" * is_partial
    return f"learning rate x{number(float(np.nanmax(times)))}{where}"


def _why_scaled(evidence: Evidence, steps: np.ndarray) -> str:
    """Return the reason beside r that most of the steps share, empty where there is none."""
    told = Counter(evidence.why_scaled.get(step, "") for step in steps.tolist())
    (why, times), *_ = told.most_common(1)
    return why if times > len(steps) / 2 else ""


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
        return _few_losses(evidence, episode)
    if effect.kind in ("held", "unclear") and not episode.first:  # one loss before tells little
        return f"loss {before} at first, {after} after"
    if (
        effect.kind == "held"
        and not np.isfinite(evidence.loss[episode.first : episode.last + 1]).any()
    ):
        return f"loss unaffected from then on ({before} before, {after} after)"
    if effect.kind == "held" and effect.before - effect.after > 0.2 * abs(effect.before):
        return f"loss went on falling ({before} before, {after} after)"
    if effect.kind == "held":
        return f"loss unaffected ({before} before, {after} after)"
    if effect.kind == "unclear":
        levels = f"{before} before, {after} after, give or take {number(effect.give)}"
        return f"no rise of the loss beyond its noise ({levels})"
    if effect.kind == "lost":
        rose = f"rose from {before} to {number(effect.peak)}" * bool(np.isfinite(effect.peak))
        rose = rose or f"was {before}"
        return f"loss {rose} and was not finite from step {step[effect.until]} on"
    if effect.back is not None and np.isinf(effect.peak):
        return f"loss was not finite until step {step[effect.back]}, then {after} ({before} before)"
    rose = f"loss rose from {before} to {number(effect.peak)}"
    if np.isinf(effect.peak):
        rose = f"loss went from {before} to not finite"
    if effect.back is not None:
        return f"{rose}, and was back at {after} by step {step[effect.back]}"
    return f"{rose} and stayed up ({after} by step {step[effect.until]})"


def _few_losses(evidence: Evidence, episode: Episode) -> str:
    """Return why nothing can be said about the loss, with what is known of it."""
    effect, end = episode.effect, len(evidence.loss) - 1
    if np.isnan(effect.before):
        return "no loss was logged before it to compare with"
    if episode.last == end:
        return "nothing follows yet to judge by"
    return f"too few losses follow to judge ({number(effect.before)} before)"
