"""How each step of a run was measured, from the estimator's text in its record."""

from functools import lru_cache

import numpy as np

from safestep.runlog.reader import Run

# By how, in the order of trust: the word that the record's estimator begins with.
WAYS = {"exact": "jvp", "difference": "difference", "secant": "secant", "predicted": "predicted"}


@lru_cache(maxsize=16)
def how_measured(run: Run) -> dict[str, np.ndarray]:
    """Return which steps were measured in which way.

    A step of several optimizers counts as the least trusted of its records.

    Args:
        run: The run.

    Returns:
        By way, "exact", "difference", "secant", "predicted", "unmeasured" and "unknown", a mask
        over the steps in rising order. Shape ``[T]`` each; each step is in one.
    """
    steps, groups = np.unique(run.steps["step"], return_inverse=True)
    nothing = np.full(len(groups), None, dtype=object)
    texts, status = run.steps.get("estimator", nothing), run.steps.get("status", nothing)
    words = [str(text).split(" ")[0] for text in texts]
    ranks = {word: rank for rank, word in enumerate(WAYS.values(), start=1)}
    unmeasured = len(WAYS) + 1
    rank = np.array([ranks.get(word, 0) for word in words], dtype=int)
    rank[(status == "unmeasured") | (status == "skipped")] = unmeasured
    worst = np.zeros(len(steps), dtype=int)
    np.maximum.at(worst, groups, rank)
    names = ["unknown", *WAYS, "unmeasured"]
    masks = {name: worst == place for place, name in enumerate(names)}
    return {name: masks[name] for name in [*names[1:], "unknown"]}
