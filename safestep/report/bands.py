"""The running band that a healthy run's loss and gradient norm stay in."""

import numpy as np

# A step that the guard scaled to the radius lies on it only to the rounding of the parameters.
TOLERANCE = 1e-3
WINDOW = 50  # steps whose median and deviation make a band
AFTERMATH = 5  # steps after a step whose median is judged: one bad batch is no harm
_NUM_DEVIATIONS = 4.0
_MAD_TO_STD = 1.4826  # of a normal distribution
# Cross-entropy so little above nothing is no harm: a step at r <= 1 doubles a tiny loss.
MIN_WIDTH = 0.05
_MAX_BANDS = 20_000  # a long run's band is known at so many steps, and held between


def lost_is_infinite(loss: np.ndarray) -> np.ndarray:
    """Return the loss, infinite where it is NaN although it was logged at every step.

    Args:
        loss: One value a step, NaN where it was NaN or not logged. Shape ``[T]``.

    Returns:
        The losses. Shape ``[T]``; NaN before the first one that was logged.
    """
    known = np.flatnonzero(~np.isnan(loss))
    if len(known) < 2 or np.median(np.diff(known)) > 1:  # logged now and then
        return loss
    lost = np.isnan(loss)
    lost[: known[0]] = False
    return np.where(lost, np.inf, loss)


def upper_band(values: np.ndarray, min_width: float = 0.0) -> np.ndarray:
    """Return the upper edge of the running band that values of a healthy run stay under.

    edge = m + max(4 x 1.4826 d, min_width), where m is the least running median so far and d the
    running median absolute deviation where it was reached: what the run does once it is lost
    makes no band. Only steps before count.

    Args:
        values: One value a step, NaN where unknown. Shape ``[T]``.
        min_width: Least distance of the edge from the median.

    Returns:
        The edges. Shape ``[T]``; infinite where nothing came before.
    """
    length = len(values)
    ends = np.unique(np.linspace(0, length, min(length, _MAX_BANDS), endpoint=False).astype(int))
    padded = np.concatenate([np.full(WINDOW, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[ends] if length else values
    is_known = np.isfinite(windows).any(axis=-1)
    median, deviation = np.full(len(ends), np.inf), np.zeros(len(ends))
    if is_known.any():
        known = np.where(np.isfinite(windows[is_known]), windows[is_known], np.nan)
        median[is_known] = np.nanmedian(known, axis=1)
        deviation[is_known] = np.nanmedian(abs(known - median[is_known][:, None]), axis=1)
    is_best = median == np.minimum.accumulate(median)
    best = np.maximum.accumulate(np.where(is_best, np.arange(len(ends)), 0))
    width = _NUM_DEVIATIONS * _MAD_TO_STD * deviation[best]
    edges = median[best] + np.maximum(width, min_width)
    return edges[np.searchsorted(ends, np.arange(length), side="right") - 1]


def is_over_band(values: np.ndarray, edges: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return at which of the steps asked for the values that followed were over the band.

    Args:
        values: One value a step; one that is infinite or NaN right after a step is over.
        edges: Upper edges. Shape ``[T]``.
        asked: Mask of steps. Shape ``[T]``.

    Returns:
        A mask. Shape ``[T]``; false where nothing followed.
    """
    over = np.zeros(len(values), dtype=bool)
    at = np.flatnonzero(asked)
    over[at] = aftermath(values, at) > edges[at]
    return over


def aftermath(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the median of the five values after each of some steps.

    Args:
        values: One value a step. Shape ``[T]``.
        at: Indices of steps. Shape ``[K]``.

    Returns:
        The medians. Shape ``[K]``; NaN where nothing known followed.
    """
    padded = np.concatenate([values, np.full(AFTERMATH, np.nan)])
    following = np.lib.stride_tricks.sliding_window_view(padded, AFTERMATH)[at + 1]
    ranked = np.sort(following, axis=1)  # NaN last; numpy's nanmedian takes 30 times as long
    num_known = (~np.isnan(ranked)).sum(axis=1)
    middle = ((num_known - 1) // 2).clip(min=0)  # of an even number, the lower of the middle two
    return ranked[np.arange(len(at)), middle]
