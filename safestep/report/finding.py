"""One finding of the page's headline, and what several kinds of findings look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from safestep.plots.wording import count, listed, steps_between
from safestep.report.bands import TOLERANCE
from safestep.report.evidence import Episode, Evidence
from safestep.runlog.reader import Run
from safestep.runlog.series import spans

_MAX_PLACES = 4  # stretches of steps that are named

Tone = Literal["good", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is the matter with a run, or that nothing is.

    Attributes:
        tone: How grave it is: "good", "warn" or "bad".
        text: What happened, in one sentence.
        advice: What to do about it, in another; empty where nothing is to be done.
        is_explained: Whether the text says why; if not, the next finding about the loss is told
            too.
    """

    tone: Tone
    text: str
    advice: str = ""
    is_explained: bool = True

    @property
    def told(self) -> str:
        """The text and the advice."""
        return f"{self.text} {self.advice}".strip()


Judge = Callable[[Run, Evidence], Finding | None]


def is_over(evidence: Evidence) -> np.ndarray:
    """Return at which steps the proposed r was over the limit. Shape ``[T]``."""
    return evidence.series.proposed > evidence.limit * (1 + TOLERANCE)


def is_let_through(evidence: Evidence, episode: Episode) -> bool:
    """Return whether any step of an episode was taken over the limit."""
    taken = evidence.series.taken[episode.first : episode.last + 1]
    return bool((taken > evidence.limit * (1 + TOLERANCE)).any())


def is_watched(run: Run) -> bool:
    """Return whether the guard only measured, as its settings say."""
    return run.settings.get("action") == "monitor"


def touched(evidence: Evidence, longest: str = "") -> str:
    """Return how many steps the guard scaled down or did not take, and why.

    Args:
        evidence: What the run's steps are judged by.
        longest: What is said of the longest of the steps that were scaled down, if anything.

    Returns:
        A predicate.
    """
    series, facts, why = evidence.series, [], [longest] * bool(longest)
    if series.clipped.any():
        facts.append(f"scaled down {int(series.clipped.sum()):,}")
    if series.skipped.any():
        facts.append(f"did not take {int(series.skipped.sum()):,}")
        why.append(next(iter(evidence.reasons.values()), "reason unknown"))
    causes = f" ({'; '.join(why)})" if why else ""
    return f"{' and '.join(facts)} of {count(len(series.step), 'step')}{causes}"


def bad_batch(evidence: Evidence) -> str:
    """Return the advice to look at the first batch that gave numbers that are not finite."""
    steps = [step for step, reason in evidence.reasons.items() if "not finite" in reason]
    if not steps:
        return ""
    touched = np.zeros(max(steps) + 1, dtype=bool)
    touched[steps] = True
    places = [steps_between(*span).split(" ")[1] for span in spans(touched)]
    told, left_out = places[:_MAX_PLACES], len(places) - _MAX_PLACES
    told += [f"at {count(left_out, 'more stretch')}"] if left_out > 0 else []
    where = listed(told)
    return f"Look at the batch{'es' * (len(steps) > 1)} of step{'s' * (len(steps) > 1)} {where}."
