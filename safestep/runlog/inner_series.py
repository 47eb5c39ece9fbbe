"""Series of the radii inside a model over a run."""

import math
from collections import Counter
from typing import Any

import numpy as np

from safestep.runlog.reader import Run

RADII = ("output", "attention", "ffn")


def least_radii(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the smallest radius of each kind at every step, over layers and optimizers.

    Args:
        run: A run that logged ``radii``; malformed values are tolerated.

    Returns:
        The steps, shape ``[T]``, and for each kind a parameter distance per step, NaN where there
        is none. Empty if the run has no radii. Kinds that the run does not have are left out.

    Example:
        >>> import tempfile
        >>> from safestep.runlog.reader import read_run
        >>> from safestep.runlog.writer import RunLog
        >>> run_dir = tempfile.mkdtemp()
        >>> with RunLog(run_dir, {}) as log:
        ...     radii = {"output": 2.0, "ffn": {"blocks.0": 3.0, "blocks.1": 1.0}}
        ...     log.write("step", {"step": 7, "radii": radii})
        >>> least_radii(read_run(run_dir))
        (array([7]), {'output': array([2.]), 'ffn': array([1.])})
    """
    records = run.steps.get("radii", np.empty(0, dtype=object))
    is_one = np.array([isinstance(record, dict) for record in records], dtype=bool)
    if not is_one.any():
        return np.empty(0, dtype=np.int64), {}
    steps, place = np.unique(run.steps["step"][is_one], return_inverse=True)
    found = {}
    for kind in RADII:
        least = np.full(len(steps), np.nan)
        np.fmin.at(least, place, [_least(record.get(kind)) for record in records[is_one]])
        if not np.isnan(least).all():
            found[kind] = least
    return steps, found


def binding_shares(radii: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the share of the steps at which each radius is the smallest, most frequent first.

    Args:
        radii: What ``least_radii`` found.

    Returns:
        Shares, by kind, of the steps that have a finite radius.

    Example:
        >>> binding_shares({"output": np.array([2.0, 1.0]), "ffn": np.array([1.0, np.nan])})
        {'ffn': 0.5, 'output': 0.5}
    """
    kinds = list(radii)
    table = np.array([np.where(np.isfinite(radii[kind]), radii[kind], np.inf) for kind in kinds])
    table = table[:, np.isfinite(table).any(axis=0)] if kinds else table
    counts = Counter(kinds[index] for index in table.argmin(axis=0)) if table.size else Counter()
    return {kind: count / counts.total() for kind, count in counts.most_common()}


def _least(value: Any) -> float:
    numbers = [_number(item) for item in (value.values() if isinstance(value, dict) else [value])]
    return min((number for number in numbers if not math.isnan(number)), default=math.nan)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
