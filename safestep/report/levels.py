"""Compare the level of the loss before an event with its level after, in view of its noise."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

_BEFORE = 50  # values before an event that give its level and its noise
_RECENT = 20  # of these, where they have a trend
_MIN_BEFORE = 8  # fewer do not tell their noise: that of the values after stands in
_WINDOWS = (5, 10, 20, 50)  # a rise shows in the median of so many values: one bad batch is none
_ONSET = 20  # a rise that is an event's own begins within so many values after it
_HORIZON = 200  # values after an event in which its effect is looked for
_LASTING = 10  # so many values at the old level are a return
_MAX_WINDOWS = 5000  # looked at in a long run
_SURE = 5.0  # standard errors that a rise has to exceed: some hundred windows are looked at
_CLOSE = 2.5  # standard errors that may lie between an unchanged level and a material rise
_MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean, normal noise
_MAD_TO_STD = 1.4826  # of a normal distribution
_MATERIAL = 0.05  # a rise is material from this share of the level on,
_MATERIAL_NATS = 0.02  # and from this much on

Kind = Literal["unknown", "held", "unclear", "back", "up", "lost"]


@dataclass(frozen=True, slots=True)
class Effect:
    """What the loss did after an event.

    Attributes:
        kind: "held" (the level after is that before, or lower), "unclear" (no rise beyond the
            noise, which could hide one), "back" (rose and came back), "up" (rose and did not come
            back), "lost" (not finite at the end of what was looked at), "unknown" (too few values).
        before: Level before the event.
        after: Level at the end of what was looked at.
        peak: Highest level after the event; infinite where the loss was not finite, of a lost loss
            the highest before it was lost, infinite if it had not risen before.
        give: What the noise may add to the difference of the levels.
        until: Index of the last value that was looked at; of a lost loss, the first lost one.
        back: Index of the value from which on the loss was back, else None.
    """

    kind: Kind
    before: float = np.nan
    after: float = np.nan
    peak: float = np.nan
    give: float = np.nan
    until: int = 0
    back: int | None = None

    @property
    def edge(self) -> float:
        """Level from which on a rise is material."""
        return self.before + _material(self.before)

    @property
    def is_harm(self) -> bool:
        """Whether the loss rose and stayed up."""
        return self.kind in ("up", "lost")

    @property
    def has_risen(self) -> bool:
        """Whether the loss rose, for a while or for good."""
        return self.kind in ("back", "up", "lost")


@dataclass(frozen=True, slots=True)
class _Before:
    """The loss before an event.

    Attributes:
        level: Its level at the event.
        lowest: The same, if what looks like chance was a falling trend.
        slope: Its trend, a value.
        noise: Standard deviation of one value.
        error: Standard error of the level.
    """

    level: float
    lowest: float
    slope: float
    noise: float
    error: float

    @property
    def material(self) -> float:
        """Least rise that counts."""
        return _material(self.level)


def effect_of(
    loss: np.ndarray, first: int, last: int, end: int | None = None, known: np.ndarray | None = None
) -> Effect:
    """Return what the loss did after the event at some steps.

    The level before is the median of the values up to the first step (which are from before its
    update), or the end of their line where they have a trend. Where these are fewer than eight, the
    values after tell the noise, so that only a large rise shows. The loss has risen where the
    median of 5, 10, 20 or 50 values in a row is above it by a material amount (5 % and 0.02) that
    five standard errors of the noise do not explain.

    Args:
        loss: One value a step; NaN where it was not logged, infinite where it was not finite.
        first: Index of the event's first step.
        last: Index of its last.
        end: Index from which on another event may be at work; the end of the run without.
        known: Indices of the values that are not NaN, to save looking for them.

    Returns:
        The effect. ``back`` is an index into ``loss``.
    """
    known = np.flatnonzero(~np.isnan(loss)) if known is None else known
    start = int(np.searchsorted(known, first, side="right"))
    stop = len(known) if end is None else int(np.searchsorted(known, end))
    past = loss[known[max(0, start - _BEFORE) : start]]
    at = known[start:stop][: last - first + _HORIZON]
    after = loss[at]
    before = _level_before(past[np.isfinite(past)], after[np.isfinite(after)][:_BEFORE])
    if before is None or len(at) < 1:
        return Effect("unknown", before.level if before else np.nan)
    onset = int((at <= last).sum()) + _ONSET
    rise, peak = _rise(after, onset, before)
    tail = after[-min(_BEFORE, max(_LASTING, len(after) // 2)) :]
    level, give = _median(tail), _CLOSE * before.noise * _error(len(tail), before)
    if rise is None:
        return _unrisen(after, before, level, give)
    until = int(at[-1])
    if not np.isfinite(tail[-_LASTING:]).any():
        lost = int(np.isfinite(after).nonzero()[0][-1]) + 1 if np.isfinite(after).any() else 0
        peak = _rise(after[:lost], onset, before)[1]
        peak = peak if np.isfinite(peak) else np.inf
        return Effect("lost", before.level, np.inf, peak, give, int(at[min(lost, len(at) - 1)]))
    back = _return(after, rise, before)
    if level > before.level + max(before.material, give):
        back = None
    if back is None:
        return Effect("up", before.level, level, peak, give, until)
    level = _median(after[back:][:_BEFORE])
    return Effect("back", before.level, level, peak, give, until, int(at[back]))


def last_rise(loss: np.ndarray) -> tuple[float, int, float] | None:
    """Return how far a run's loss ended above the lowest level it had, None if it did not.

    Args:
        loss: One value a step; NaN where it was not logged, infinite where it was not finite.

    Returns:
        The lowest level, the index at which it was reached, and the level at the end. Levels are
        medians of at least 20 values.
    """
    known = np.flatnonzero(~np.isnan(loss))
    width = max(20, len(known) // 50)
    if len(known) < 3 * width:
        return None
    values = loss[known]
    starts, medians = _rolling(values, width)
    best = int(medians.argmin())
    if np.isinf(medians[best]):  # never finite for long
        return None
    window = values[starts[best] :][:width]
    noise = _MAD_TO_STD * float(np.median(abs(window - medians[best])))
    margin = _SURE * noise * _MEDIAN_ERROR * math.sqrt(2 / width)
    lowest, final = float(medians[best]), float(medians[-1])
    if final <= lowest + max(2 * _material(lowest), margin):
        return None
    return lowest, int(known[starts[best] + width // 2]), final


def course(loss: np.ndarray) -> tuple[float, float, float] | None:
    """Return where a run's loss began and ended, and how far chance may put the two apart.

    Args:
        loss: One value a step; NaN where it was not logged, infinite where it was not finite.

    Returns:
        The levels of the first and the last tenth of the values, and 2.5 standard errors of their
        difference; None where fewer than eight values are finite.
    """
    values = loss[np.isfinite(loss)]
    if len(values) < _MIN_BEFORE:
        return None
    width = max(_MIN_BEFORE // 2, len(values) // 10)
    steps = np.diff(values)  # whatever the trend, neighbours differ by their noise
    noise = _MAD_TO_STD * float(np.median(abs(steps - np.median(steps)))) / math.sqrt(2)
    margin = _CLOSE * noise * _MEDIAN_ERROR * math.sqrt(2 / width)
    return _median(values[:width]), _median(values[-width:]), margin


def _material(level: float) -> float:
    """Return the least rise over a level that counts."""
    return max(_MATERIAL * abs(level), _MATERIAL_NATS)


def _unrisen(after: np.ndarray, before: _Before, level: float, give: float) -> Effect:
    """Return "held" where that is shown, "unclear" where the noise could hide a rise."""
    head = after[: max(_WINDOWS)]
    is_long = len(after) >= _LASTING
    highest = max(_median(head), level)
    early = _CLOSE * before.noise * _error(len(head), before)
    is_close = highest + max(early, give) <= before.lowest + before.material
    kind = "held" if is_close and is_long else "unclear" if is_long else "unknown"
    return Effect(kind, before.level, level, highest, max(early, give))


def _level_before(values: np.ndarray, after: np.ndarray) -> _Before | None:
    """Return level and noise of the values before an event, None where there is none."""
    if not len(values):
        return None
    if len(values) < _MIN_BEFORE:
        noise = max(float(np.ptp(values)) / 2, _line(after)[2] if len(after) > 1 else 0.0)
        error = _MEDIAN_ERROR * noise / math.sqrt(len(values))
        return _Before(float(np.median(values)), float(values.min()), 0.0, noise, error)
    slope, end, noise = _line(values)
    error = _MEDIAN_ERROR * noise / math.sqrt(len(values))
    level = float(np.median(values))
    if abs(slope) * len(values) <= 3 * math.sqrt(12) * error:  # no more than chance
        return _Before(level, min(level, end), 0.0, noise, error)
    recent = values[-_RECENT:]  # a curve is a line over a short stretch
    slope, end, noise = _line(recent)
    return _Before(end, end, slope, noise, 2 * _MEDIAN_ERROR * noise / math.sqrt(len(recent)))


def _line(values: np.ndarray) -> tuple[float, float, float]:
    """Return slope and last level of a robust line (Theil and Sen), and the noise around it."""
    place = np.arange(len(values), dtype=float)
    i, j = np.triu_indices(len(values), 1)
    slope = float(np.median((values[j] - values[i]) / (j - i)))
    offsets = values - slope * place
    middle = float(np.median(offsets))
    noise = _MAD_TO_STD * float(np.median(abs(offsets - middle)))
    return slope, middle + slope * place[-1], noise


def _error(count: int, before: _Before) -> float:
    """Return the standard error of a difference of levels, over the noise."""
    own = before.error / before.noise if before.noise else 0.0
    return float(np.hypot(_MEDIAN_ERROR / np.sqrt(max(count, 1)), own))


def _edge(count: int, before: _Before) -> float:
    """Return the level that a median of so many values does not exceed without a rise."""
    return before.level + max(before.material, _SURE * before.noise * _error(count, before))


def _rise(after: np.ndarray, onset: int, before: _Before) -> tuple[int | None, float]:
    """Return where the loss first was above its old level, and the highest level it had."""
    first, peak = None, -np.inf
    for width in _WINDOWS:
        if len(after) < width:
            break
        starts, medians = _rolling(after, width)
        trend = max(before.slope, 0.0) * (starts + width)  # it rose already
        over = np.flatnonzero((medians - trend > _edge(width, before)) & (starts <= onset))
        if len(over):
            start = int(starts[over[0]])
            first = start if first is None else min(first, start)
            peak = max(peak, float(medians[over[0] :].max()))
    return first, peak


def _return(after: np.ndarray, rise: int, before: _Before) -> int | None:
    """Return from where on the loss is at its old level for good, None if it is not."""
    rest = after[rise:]
    width = min(20, len(rest))
    if width < _LASTING:
        return None
    starts, medians = _rolling(rest, width)
    over = np.flatnonzero(medians > _edge(width, before))
    if len(over) and over[-1] == len(starts) - 1:
        return None
    start = int(starts[over[-1] + 1]) if len(over) else 0
    # The first of these windows still holds some of what was before: look at the values in it.
    single, few = _edge(1, before), _edge(5, before)
    at = next(
        (i for i in range(start, len(rest)) if rest[i] <= single and _median(rest[i:][:5]) <= few),
        len(rest),
    )
    return rise + at if len(rest) - at >= _LASTING else None


def _rolling(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where some windows start, the last one among them, and their medians."""
    num_windows = len(values) - width + 1
    starts = np.unique(np.linspace(0, num_windows - 1, min(num_windows, _MAX_WINDOWS)).astype(int))
    return starts, np.median(
        np.lib.stride_tricks.sliding_window_view(values, width)[starts], axis=1
    )


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else np.nan
