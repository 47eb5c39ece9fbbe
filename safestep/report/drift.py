"""Which workers or replicas of a run are off, and since when."""

import re
from typing import Any

import numpy as np

from safestep.plots.wording import count, number, percent, sentence
from safestep.runlog.reader import Run
from safestep.runlog.series import scalar, worker_noun

_MAX_WORKERS = 5  # named one by one
_LEVEL_OF = 50  # records from the onset of a deviation, of which medians are told
_COLUMNS = {
    "loss": ("loss", "loss"),
    "gradient norm": ("grad_norm", "gradient norm"),
    "cosine to the mean": ("cosine_to_mean", "gradient's cosine to the mean"),
}  # column and words for the quantity of an event
_OFTEN = 10  # flags within twenty records; alike workers have one in a hundred steps


def drifted_workers(run: Run) -> list[str]:
    """Return a sentence for each worker or replica that was found off, dated from its beginning.

    Args:
        run: The run.

    Returns:
        The sentences, the earliest drift first; empty where the workers agree.
    """
    found: dict[str, tuple[float, str]] = {}
    for event in run.events:
        if event.get("name") in ("worker", "replica"):
            since = event.get("since", event.get("step"))
            date = float(since) if isinstance(since, (int, float)) else np.inf
            who = f"{event.get('name')} {event.get('rank', event.get('ranks'))}"
            found.setdefault(who, (date, _tell(event, since, worker_noun(run), run)))
    sentences = [text for _, text in sorted(found.values(), key=lambda item: item[0])]
    sentences = sentences or _standing_out(run)
    if len(sentences) > _MAX_WORKERS:
        more = count(len(sentences) - _MAX_WORKERS, f"more {worker_noun(run)}")
        sentences = [*sentences[:_MAX_WORKERS], sentence(f"{more} drifted")]
    return sentences


def _tell(event: dict[str, Any], since: Any, noun: str, run: Run) -> str:
    """Return an event as a sentence: in levels where the log has them, else its message."""
    levels = _levels(event, run)
    if levels:
        return sentence(f"{noun} {event['rank']} is off from step {since} on: {levels}")
    message = re.sub(r"^ranks? [^:]{0,99}: | since step \d+", "", str(event.get("message")))
    noun = "replica" if event.get("name") == "replica" else noun
    who = event.get("rank", event.get("ranks"))
    whose = f"{noun} {who}" if isinstance(who, int) else f"a {noun}"
    return sentence(
        f"{whose} {'drifted' if noun == 'replica' else 'is off'} from step {since} on ({message})"
    )


def _levels(event: dict[str, Any], run: Run) -> str:
    """Return the medians of what deviates, and of the same on the others, since the onset."""
    quantity, rank, since = (event.get(name) for name in ("quantity", "rank", "since"))
    name, word = _COLUMNS.get(str(quantity), ("", ""))
    values = run.workers.get(name)
    if values is None or values.ndim != 2 or not isinstance(since, (int, float)):
        return ""
    if not isinstance(rank, int) or not 0 <= rank < values.shape[1] or values.shape[1] < 2:
        return ""
    inside = values[run.workers["step"] >= since][:_LEVEL_OF]
    own, others = inside[:, rank], np.delete(inside, rank, axis=1)
    if not np.isfinite(own).any() or not np.isfinite(others).any():
        return ""
    mine, theirs = (number(float(np.median(of[np.isfinite(of)]))) for of in (own, others))
    others = f"that of the {values.shape[1] - 1} others {theirs}"
    over = f"medians of {count(len(inside), 'step')}" if len(inside) > 1 else "at that step"
    return f"its {word} was {mine}, {others} ({over})"


def _standing_out(run: Run) -> list[str]:
    """Return the workers that stood out at most steps of some stretch of twenty records."""
    outlier, sentences = scalar(run, "outlier"), []
    for worker in np.unique(outlier[np.isfinite(outlier)])[:1000]:
        flags = np.flatnonzero(outlier == worker)
        dense = np.flatnonzero(flags[_OFTEN - 1 :] - flags[: 1 - _OFTEN] < 2 * _OFTEN)
        if len(dense):
            since = run.workers["step"][flags[dense[0]]]
            share = (outlier[flags[dense[0]] :] == worker).mean()
            what = f"{worker_noun(run)} {worker:.0f} stood out from step {since} on"
            sentences.append(sentence(f"{what}, at {percent(share)} of the measured steps"))
    return sentences
