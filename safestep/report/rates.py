"""Findings about the learning rate: is it too large, or could it be larger?"""

import numpy as np

from safestep.plots.wording import number, percent
from safestep.report.evidence import Evidence
from safestep.report.finding import Finding
from safestep.report.levels import course
from safestep.runlog.reader import Run

OFTEN = 0.5  # share of steps from which on something is no accident
_FAR_UNDER = 0.01  # of the limit: an r so small leaves room for a larger learning rate
_FIRST_TRY = 10  # times the learning rate: r then grows as much, and stays under the limit
_LITTLE = 0.1  # of the loss: a fall by less is called little
_MOST = 0.95  # share of the steps that a suggested learning rate would have kept under the limit


def too_hot(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether most steps had to be scaled down, and by how much the rate is too large."""
    series = evidence.series
    thirds = [part for part in np.array_split(series.clipped, 3) if len(part)]
    is_hot = max(part.mean() for part in thirds) > OFTEN
    if not is_hot or run.settings.get("action") == "set":
        return None
    safe, over = safe_learning_rate(evidence), series.proposed[series.clipped] / evidence.limit
    times = float(np.quantile(over[~np.isnan(over)], _MOST)) if np.isfinite(over).any() else np.inf
    if safe is not None:
        times = float(np.nanmedian(series.learning_rate[series.clipped])) / safe
    how_much = f"about {number(float(f'{times:.2g}'))} times " if np.isfinite(times) else ""
    rate = _in_use(series.learning_rate[series.clipped])
    text = f"The learning rate{rate} is {how_much}too large"
    if safe is not None:
        text += f": {would_have_stayed(safe)}"
    done = f"the guard scaled down {int(series.clipped.sum()):,} of {len(series.step):,} steps"
    return Finding("warn", f"{text}; {done}.")


def too_cold(run: Run, evidence: Evidence) -> Finding | None:
    """Return whether every step was far under the limit, whether the loss fell, and what to try."""
    r, rates = evidence.series.proposed, evidence.series.learning_rate
    r, rates = r[np.isfinite(r)], rates[np.isfinite(rates)]
    if not len(r) or evidence.series.intervened.any() or run.settings.get("action") == "set":
        return None
    peak = float(np.quantile(r, 0.99)) / evidence.limit
    if not 0 < peak < _FAR_UNDER:
        return None
    peak, limit = number(peak * evidence.limit), number(evidence.limit)
    text = (
        f"The learning rate{_in_use(rates)} could be larger: r was {peak} or less at 99 % of the "
    )
    text += f"steps, far below the limit of {limit}{say_course(evidence)}."
    first = number(_FIRST_TRY * float(rates.max())) if len(rates) else f"{_FIRST_TRY} times as much"
    return Finding("warn", text, f"Try {first} first; r then tells whether to go on.")


def _in_use(rates: np.ndarray) -> str:
    """Return the learning rate in brackets, its median where it changed; nothing if unknown."""
    rates = rates[np.isfinite(rates)]
    if not len(rates):
        return ""
    return f" ({number(float(np.median(rates)))}{', the median' * bool(np.ptp(rates))})"


def say_course(evidence: Evidence) -> str:
    """Return whether the loss fell over the run, with its levels at both ends.

    Args:
        evidence: The run's evidence.

    Returns:
        A clause that begins with a semicolon; empty where the log holds too few losses.
    """
    ends = course(evidence.loss)
    if ends is None:
        return ""
    first, last, noise = ends
    if first - last > noise:
        little = " only" * (first - last < _LITTLE * abs(first))
        return f"; the loss fell{little} from {number(first)} to {number(last)}"
    return f"; the loss did not fall beyond its noise (from {number(first)} to {number(last)})"


def safe_learning_rate(evidence: Evidence) -> float | None:
    """Return the learning rate that would have kept 95 % of the steps under the limit.

    It is a low quantile of learning rate x limit / r over the measured steps: r is proportional to
    the length of the step, and the length to the learning rate.

    Args:
        evidence: What the run's steps are judged by.

    Returns:
        The rate, None where the log does not tell.
    """
    series = evidence.series
    is_known = (series.proposed > 0) & (series.learning_rate > 0)
    is_known &= np.isfinite(series.proposed) & np.isfinite(series.learning_rate)
    if not is_known.any():
        return None
    rates = series.learning_rate[is_known] * evidence.limit / series.proposed[is_known]
    return float(np.quantile(rates, 1 - _MOST))


def would_have_stayed(rate: float) -> str:
    """Return in words that a learning rate would have been small enough."""
    return f"{number(rate)} would have stayed under the limit at {percent(_MOST)} of the steps"
