"""How each step of a run was measured, from the estimator's text in its record."""

from functools import lru_cache

import numpy as np

from safestep.measure.estimator_registry import Estimator
from safestep.runlog.reader import Run

# By the word that a record's estimator begins with, in the order of trust.
_WAYS = {each.value: each.way for each in Estimator}


@lru_cache(maxsize=16)
def how_measured(run: Run) -> dict[str, np.ndarray]:
    """Return which steps were measured in which way.

    A step of several optimizers counts as the least trusted of its records.

    Args:
        run: The run.

    Returns:
        A mask over the steps in rising order by way: that of each estimator, "unmeasured",
        "unknown" and any other that a record names, which is trusted more than a prediction
        alone. Shape ``[T]`` each; each step is in one.
    """
    steps, groups = np.unique(run.steps["step"], return_inverse=True)
    nothing = np.full(len(groups), None, dtype=object)
    texts, status = run.steps.get("estimator", nothing), run.steps.get("status", nothing)
    words = [text.split(" ")[0] if isinstance(text, str) else "" for text in texts]
    *measured, predicted = _WAYS
    known = [*measured, *sorted({*words} - {*_WAYS, ""}), predicted]
    ranks = {word: rank for rank, word in enumerate(known, start=1)}
    unmeasured = len(known) + 1
    rank = np.array([ranks.get(word, 0) for word in words], dtype=int)
    rank[(status == "unmeasured") | (status == "skipped")] = unmeasured
    worst = np.zeros(len(steps), dtype=int)
    np.maximum.at(worst, groups, rank)
    names = ["unknown", *(_WAYS.get(word, word) for word in known), "unmeasured"]
    masks = {name: worst == place for place, name in enumerate(names)}
    return {name: masks[name] for name in [*names[1:], "unknown"]}
