"""Name each step's regime: was it inside the radius, and if not, did the loss hold?"""

import numpy as np

from safestep.report.bands import TOLERANCE, aftermath, is_over_band, upper_band
from safestep.report.evidence import Evidence, find_episodes
from safestep.runlog.reader import Run
from safestep.runlog.series import worker_mean

REGIMES = {
    "inside": "the step was no longer than the radius (r <= 1)",
    "scaled": "the step was longer; the guard scaled it down to r <= 1",
    "not taken": "the guard did not take the step; the weights stayed as they were",
    "controlled": "r > 1, and loss and gradient norm stayed at their levels",
    "unsettled": "r > 1, and the gradient norm rose while the loss held",
    "harmful": "r > 1, and the loss rose",
    "unknown": "not measured, or r > 1 without a loss to judge by",
}


def name_regimes(run: Run, evidence: Evidence) -> dict[str, np.ndarray]:
    """Return by regime the mask of its steps; each step is in one.

    Args:
        run: The run; its workers' gradient norms are judged where it has them.
        evidence: What its steps are judged by.

    Returns:
        A mask of shape ``[T]`` for each of ``REGIMES``.
    """
    series = evidence.series
    grad_norm = worker_mean(run, "grad_norm", series.step)
    is_safe = series.taken <= 1 + TOLERANCE
    is_long = series.taken > 1 + TOLERANCE
    is_inflated = is_long & _has_risen(evidence)
    is_unsettled = is_over_band(grad_norm, upper_band(grad_norm), is_long) & ~is_inflated
    is_judged = is_long & ~np.isnan(aftermath(evidence.loss, np.arange(len(series.step))))
    return {
        "inside": is_safe & ~series.intervened,
        "scaled": is_safe & series.clipped & ~series.skipped,
        "not taken": is_safe & series.skipped,
        "controlled": is_judged & ~is_inflated & ~is_unsettled,
        "unsettled": is_judged & is_unsettled,
        "harmful": is_judged & is_inflated,
        "unknown": ~is_safe & ~is_judged,
    }


def _has_risen(evidence: Evidence) -> np.ndarray:
    """Return at which steps the loss was above its level before the episode they are in."""
    risen = np.zeros(len(evidence.loss), dtype=bool)
    for episode in find_episodes(evidence):
        inside = slice(episode.first, episode.last + 1)
        if episode.effect.has_risen:
            risen[inside] = evidence.after[inside] > episode.effect.edge
        elif episode.effect.kind == "unknown":  # nothing came before: judge by the running band
            risen[inside] = evidence.is_over_band[inside]
    return risen
