"""What second runs of touched steps' batches showed: is this machine the cause, or is it not?"""

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from safestep.plots.wording import sentence
from safestep.runlog.reader import Run

_MAX_TOLD = 2
_TOLD = {
    "same": "run again, {whose} gave the same result bit for bit, so this machine is not the cause",
    "rounded": (
        "run again, {whose} gave the same result up to rounding, so this machine is not the cause"
    ),
    "other": (
        "run again, {whose} gave another result{where}: this machine, or state outside the model, "
        "is the cause"
    ),
    "unknown": "{whose} {was} not compared with a second run: {why}",
}
# How the reason says it too, and older logs nothing else.
_SENTENCES = [
    (re.compile(pattern), result)
    for pattern, result in (
        ("run again, its batch gives the same result up to rounding", "rounded"),
        ("run again, its batch gives the same result", "same"),
        ("run again, its batch gives another result(?: on (ranks? [0-9, ]+))?:", "other"),
        ("its batch was not compared with a second run: (.*)", "unknown"),
    )
]


def second_runs(run: Run) -> dict[int, str]:
    """Return what a second run of its batch gave, by number of a clipped or skipped step.

    Args:
        run: The run.

    Returns:
        The results as StepReport has them.
    """
    status, results = run.steps.get("status"), run.steps.get("second_run")
    reasons = run.steps.get("reason")
    found = {}
    for at in np.flatnonzero(np.isin(status, ("clipped", "skipped"))) if status is not None else ():
        result = None if results is None else results[at]
        if result is None and reasons is not None:
            result = _from_reason(str(reasons[at]))
        if result:
            found[int(run.steps["step"][at])] = str(result)
    return found


def without_second_run(reason: str) -> str:
    """Return a reason without what it says of a second run.

    Args:
        reason: The reason in the log.
    """
    parts = reason.split("; ")
    return "; ".join(part for part in parts if not _from_reason(part))


def tell_second_runs(found: Mapping[int, str], touched: int) -> list[str]:
    """Return a sentence for each of the most frequent results.

    Args:
        found: What `second_runs` returned.
        touched: Number of steps that were touched.

    Returns:
        The sentences, at most two.

    Example:
        >>> tell_second_runs({3: "same", 8: "other: rank 1"}, touched=2)[1]
        'Run again, the batch of step 8 gave another result on rank 1: this machine, or state \
outside the model, is the cause.'
    """
    first = {result: step for step, result in reversed([*found.items()])}
    return [
        _tell(result, f"step {first[result]}", times, touched)
        for result, times in Counter(found.values()).most_common(_MAX_TOLD)
    ]


def _tell(result: str, step: str, times: int, touched: int) -> str:
    kind, _, detail = result.partition(": ")
    which = f"all {times:,}" if times == touched else f"{times:,} of {touched:,}"
    whose = f"the batches of {which} touched steps" if times > 1 else f"the batch of {step}"
    told = _TOLD.get(kind, f"{{whose}} run again: {kind}")
    was, where = "were" if times > 1 else "was", f" on {detail}" if detail else ""
    return sentence(told.format(whose=whose, was=was, where=where, why=detail))


def _from_reason(reason: str) -> str | None:
    for pattern, result in _SENTENCES:
        if match := pattern.search(reason):
            return ": ".join(filter(None, (result, *match.groups())))
    return None
