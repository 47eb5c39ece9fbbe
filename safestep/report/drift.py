"""Which workers or replicas of a run are off, and since when."""

import re
from typing import Any

import numpy as np

from safestep.plots.wording import count, percent, sentence
from safestep.runlog.reader import Run
from safestep.runlog.series import scalar, worker_noun

_MAX_WORKERS = 5  # named one by one
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
            found.setdefault(who, (date, _tell(event, since, worker_noun(run))))
    sentences = [text for _, text in sorted(found.values(), key=lambda item: item[0])]
    sentences = sentences or _standing_out(run)
    if len(sentences) > _MAX_WORKERS:
        more = count(len(sentences) - _MAX_WORKERS, f"more {worker_noun(run)}")
        sentences = [*sentences[:_MAX_WORKERS], sentence(f"{more} drifted")]
    return sentences


def _tell(event: dict[str, Any], since: Any, noun: str) -> str:
    """Return an event as a sentence; its message is quoted in plain words."""
    message = re.sub(r"^ranks? [^:]{0,99}: | since step \d+", "", str(event.get("message")))
    message = message.replace(" MADs", " times the usual spread")
    noun = "replica" if event.get("name") == "replica" else noun
    who = event.get("rank", event.get("ranks"))
    whose = f"{noun} {who}" if isinstance(who, int) else f"a {noun}"
    return sentence(f"{whose} drifted from step {since} on ({message})")


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
