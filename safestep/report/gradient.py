"""What the audits of the gradient found in a run."""

import re

import numpy as np

from safestep.plots.wording import count, number, percent, sentence
from safestep.report.finding import Finding
from safestep.runlog.reader import Run

_CLIPPED = 0.98  # a smaller ratio is the factor of clipping
_MAX_FAULTS = 5  # told one by one
_ADVICE = "Look for what changed it between the backward pass and the step."


def wrong_gradient(run: Run) -> Finding | None:
    """Return the first time that the gradient no longer matched the loss.

    Args:
        run: The run.

    Returns:
        The finding, None if there is none.
    """
    texts = _told(run, "wrong")
    return Finding("warn", texts[0], _ADVICE) if texts else None


def tell_gradient(run: Run) -> list[str]:
    """Return what the audits of the gradient found, faults first.

    Args:
        run: The run.

    Returns:
        The sentences; none for a run without audits.
    """
    found = [*_told(run, "wrong")[:_MAX_FAULTS], *_told(run, "right")[:_MAX_FAULTS]]
    ratio = np.asarray(run.steps.get("gradient_ratio", []), dtype=float)
    ratio = ratio[np.isfinite(ratio)]
    is_clipped = ratio < _CLIPPED
    audited = count(len(ratio), "audited step")
    checked = count(len(ratio), "step")
    if is_clipped.any() and not found:
        share, median = percent(is_clipped.mean()), number(float(np.median(ratio[is_clipped])))
        what = f"the gradient was clipped at {share} of {audited}, to {median} in the median"
        found.append(sentence(what))
    elif len(ratio) and not found:
        found.append(
            sentence(f"the gradient was checked against the loss at {checked}, and matched")
        )
    return found or _told(run, "not audited")[:1]


def _told(run: Run, finding: str) -> list[str]:
    """Return the messages of events as sentences."""
    messages = [
        str(event.get("message"))
        for event in run.events
        if event.get("name") == "gradient" and event.get("finding") == finding
    ]
    return [sentence(re.sub(r"^(?:the )?gradient", "the gradient", text)) for text in messages]
