"""Findings about the loss: was it lost, did it rise, and what had been let through before?"""

import numpy as np

from safestep.plots.wording import count, number, sentence
from safestep.report.drift import drifted_workers
from safestep.report.episodes import loss_effect, rate_jump, say_lost
from safestep.report.evidence import Episode, Evidence, find_episodes
from safestep.report.finding import Finding, Judge, is_let_through, is_over, is_watched, touched
from safestep.report.levels import last_rise
from safestep.runlog.reader import Run

_NEAR = 10  # steps between a long step and the loss's end: further apart, it may not be the cause


def _lost(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss is not finite at the end."""
    loss, step = evidence.loss, evidence.series.step
    known = np.flatnonzero(~np.isnan(loss))
    if not len(known) or np.isfinite(loss[known[-1]]):
        return None
    finite = np.flatnonzero(np.isfinite(loss))
    if not len(finite):
        advice = "Look at the first batch and at the initial weights."
        return Finding("bad", "Lost: the loss was never finite.", advice)
    last = int(finite[-1])
    text = f"lost: the loss is not finite after step {step[last]}"
    cause = next((e for e in find_episodes(evidence)[::-1] if e.first <= last + 1), None)
    if cause is not None and last - cause.last < _NEAR and np.isfinite(cause.peak):
        text = sentence(text + _where_long(evidence, cause))
        return Finding("bad", text, _go_back(run, step[cause.first]))
    return Finding("bad", sentence(text), _after_last(run, evidence, last), is_explained=False)


def _after_last(run: Run, evidence: Evidence, last: int) -> str:
    """Return what to do about a loss that is lost after a step, without a long step before."""
    step, is_taken = evidence.series.step, ~evidence.series.skipped[last + 1 :]
    lost = step[last + 1]
    if not is_taken.any():
        return (
            f"The weights are still those of step {step[last]}: look at the batches from step "
            f"{lost} on, and at BatchNorm's statistics."
        )
    return f"{_go_back(run, step[last])[:-1]}; look at the batch of step {lost}."


def _harmed(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss rose after a step over the limit that was let through."""
    risen = [
        episode for episode in find_episodes(evidence)
        if episode.effect.has_risen and is_let_through(evidence, episode)
    ]  # fmt: skip
    if not risen:
        return None
    worst, text = _worst(risen), sentence(f"harmed: {tell_worst(evidence, risen)}")
    if worst.effect.is_harm:
        return Finding("bad", text, _go_back(run, evidence.series.step[worst.first]))
    return Finding("bad", text, 'Use action="clip".' if is_watched(run) else "")


def _not_saved(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss rose and stayed up although the guard scaled steps down."""
    risen = [episode for episode in find_episodes(evidence) if episode.effect.is_harm]
    risen = [
        episode for episode in risen
        if evidence.series.clipped[episode.first : episode.last + 1].any()
        and not is_let_through(evidence, episode)
    ]  # fmt: skip
    if not risen:
        return None
    text = f"The guard {touched(evidence)}, yet {tell_worst(evidence, risen)}."
    first = evidence.series.step[_worst(risen).first]
    return Finding("bad", text, f"{_go_back(run, first)[:-1]} and lower max_normalized_step.")


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
    over = int(is_over(evidence).sum())
    let_through = int((is_over(evidence) & ~evidence.series.intervened).sum())
    if let_through:
        text = f"Harmed: the loss rose from {levels}, with r over the limit at {over:,} steps"
        return Finding("bad", f"{text} that were let through.", _go_back(run, step))
    who = f"the guard {touched(evidence)}" * bool(evidence.series.intervened.any())
    text = f"{who or 'no step was over the limit'}, yet the loss rose from {levels}"
    look = f"Look at what changed after step {step}, the data first."
    return Finding("warn", sentence(text), "" if drifted_workers(run) else look)


def _lost_for_a_while(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether the loss was not finite at steps that were taken, and is finite again."""
    if not (np.isinf(evidence.loss) & ~evidence.series.skipped).any():
        return None
    if np.isinf(evidence.loss[~np.isnan(evidence.loss)][-1]):  # `_lost` says it
        return None
    begin = evidence.series.step[int(np.isinf(evidence.loss).argmax())]
    text = sentence(f"the loss was {say_lost(evidence)}")
    return Finding("warn", text, f"Look at the batch of step {begin}.")


# Of these the first that holds is told, since they explain the same rise.
RISES: tuple[Judge, ...] = (_lost, _harmed, _not_saved, _risen, _lost_for_a_while)


def tell_worst(evidence: Evidence, episodes: list[Episode]) -> str:
    """Return the effect of the episode that did most to the loss, and how many others there are.

    Args:
        evidence: The run's evidence.
        episodes: Episodes after which the loss rose.

    Returns:
        A clause that begins with the step.
    """
    worst = _worst(episodes)
    long = _where_long(evidence, worst)
    more = f" ({count(len(episodes) - 1, 'more rise')} like it)" if len(episodes) > 1 else ""
    step = evidence.series.step[worst.first]
    return f"after step {step}{long}{',' * bool(long)} the {loss_effect(evidence, worst)}{more}"


def _worst(episodes: list[Episode]) -> Episode:
    return max(episodes, key=lambda e: (e.effect.is_harm, e.effect.peak - e.effect.before))


def _where_long(evidence: Evidence, episode: Episode) -> str:
    """Return how long an episode's longest step was, and whether it was taken so; or nothing."""
    is_through = is_let_through(evidence, episode)
    is_scaled = evidence.series.clipped[episode.first : episode.last + 1].any()
    if not np.isfinite(episode.peak) or not (is_through or is_scaled):
        return ""
    jump = rate_jump(evidence, episode)
    done = "was let through" if is_through else "was scaled down"
    return f", where an r of {number(episode.peak)} {f'({jump}) ' * bool(jump)}{done}"


def _go_back(run: Run, step: int) -> str:
    """Return the advice to begin again before a step, with the guard in charge."""
    back = f"Go back to a checkpoint from before step {step}"
    return f'{back} and use action="clip".' if is_watched(run) else f"{back}."
