"""When the exact radius can be spared, because the last one still tells enough."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import le
from struct import pack
from typing import Any
from zlib import crc32

FIRST_STEPS = 16  # early in training the spread per unit of distance moves fastest
FIRST_EXACT = 4  # of these, where a part of the batch tells the others
AUDIT_INTERVAL = 60  # a JVP costs about one step: one in 60 keeps an audit below 2 %
LONGEST_INTERVAL = 320  # where the bound may grow sixfold before it is over the limit
NEAR = 0.8  # of the limit: a bound that comes nearer is measured more often; a secant may not
FAR = 0.1  # of the limit: below, exact measurements are so rare that cheaper ones save nothing
ROUGH = 0.5  # of the limit: up to here an estimate from a part of the batch may let a step through
SECANTS = 7  # in a row, then an exact measurement
SAMPLES = 15  # in a row
WINDOW = 32  # steps that say what is usual, and exact measurements that bound the next ones
JUMP = 1.5  # times the window's maximum: minibatch noise stays below
DRIFT = 2.0  # times the largest at the last measurements: a warm-up goes there without a jump
OUTLIER = 3.0  # times the latest measurements: one that was over that was of other data
MARGIN = 1.4  # growth of r per unit of distance that is always allowed for between measurements
_RECENT = 4  # exact measurements that say what r and the signals are now


@dataclass(frozen=True, slots=True)
class Predicted:
    """The answer that r is surely within the limit, and what it will be."""

    normalized_step: float


class Measure(Enum):
    """The answer that this step must be measured."""

    EXACTLY = "exactly"
    QUICKLY = "quickly"  # a secant may tell
    ROUGHLY = "roughly"  # a part of the batch may tell


class Predictor:
    """Bound the next r from the last exact ones, and say when that is not enough.

    Along one direction r is proportional to the step distance, and the factor, the spread per unit
    of distance over pi, drifts slowly. From one batch to the next it varies, being that of the
    worst row. The bound is the largest factor of the last 32 measurements (but for a bad batch,
    which the latest ones are far below), times the distance of this step, times a margin that grows
    with every prediction that fell short. An exact measurement is called for

    - in the first steps, and after at most 60 steps without one, up to 320 as the bound lies below
      0.8 of the limit, down to 24 as it comes from there to the limit; sooner after a prediction
      that fell short;
    - where the bound is over the limit;
    - where a signal (step norm, gradient norm, size of the logits and of the loss's gradient there)
      exceeds what was usual: another direction or other data; or where it has crept to twice
      what it was at the last exact measurements;
    - where an option of the optimizer changed that turns the direction.

    Where nothing is unusual and r is expected between 0.1 and 0.8 of the limit, a secant will do
    instead, at less than half the cost: it is off by a few percent. Every eighth is exact, though.
    Where a part of the batch is known to tell about all of it, and r is expected below 0.5 of the
    limit, that is measured instead, for all but the first 4 steps and one in 16.

    Where a step over the limit passes if its loss falls, severity takes the place of r in all this:
    it is over the limit only if the step is to be shortened, see ``StepController.severity``. Then
    a secant is taken beyond 0.8 of the limit too: it says little about r there, but it measures the
    change of the loss itself.

    Args:
        limit: The largest r that is let through.
        passes_long_steps: Whether a step over the limit may pass for what its loss does.
    """

    def __init__(self, limit: float, passes_long_steps: bool = False) -> None:
        self.limit = limit
        self._passes_long_steps = passes_long_steps
        self._is_held = False
        self._radii, self._severities = _Factors(), _Factors()
        self._margin = MARGIN
        self._steps = 0
        self._interval = 1
        self._since = 0
        self._since_exact = 0  # measurements
        self._usual = _Window(WINDOW)
        self._measured = _Window(_RECENT)
        self._options: tuple[Any, ...] = ()
        self._trail = 0  # checksum of all inputs so far

    def predict(
        self,
        step_norm: float,
        signals: Sequence[float],
        options: tuple[Any, ...],
        *,
        can_sample: bool = False,
        is_held: bool = False,
    ) -> Predicted | Measure:
        """Return the predicted r, or how this step has to be measured.

        Args:
            step_norm: Distance of the proposed update.
            signals: Sizes that tell the usual from the unusual, always the same ones.
            options: What turns the direction of an update when it changes.
            can_sample: Whether a part of the batch is known to tell about all of it.
            is_held: Whether a step over the limit is shortened even if its loss falls.

        Returns:
            r of the update, if the step will surely pass; else how to measure it.
        """
        self._steps += 1
        self._since += 1
        signals = (step_norm, *signals)
        self._note(*signals, is_held)
        is_unusual = self._is_unusual(signals) or options != self._options
        if all(map(math.isfinite, signals)):  # infinity would make everything usual after it
            self._usual.append(signals)
        self._options = options
        self._is_held = is_held
        factors = self._deciding
        expected, bound = factors.latest * step_norm, factors.largest * step_norm * self._margin
        may_sample = can_sample and self._since_exact < SAMPLES
        will_sample_do = may_sample and expected <= ROUGH * self.limit
        is_early = self._steps <= FIRST_STEPS
        if is_unusual or self._steps <= FIRST_EXACT or not factors.values:
            return Measure.EXACTLY
        if will_sample_do and (is_early or bound > self.limit):
            return Measure.ROUGHLY
        if is_early:
            return Measure.EXACTLY
        if bound <= self.limit and not self._is_due(bound):
            return Predicted(self._radii.latest * step_norm)
        may_tell = self._passes_long_steps or expected <= NEAR * self.limit
        is_between = may_tell and expected >= FAR * self.limit
        return Measure.QUICKLY if is_between and self._since_exact < SECANTS else Measure.EXACTLY

    def trail(self, options: tuple[Any, ...]) -> float:
        """Return a number that is equal on ranks that give one answer to the same signals.

        Args:
            options: What turns the direction of the next update when it changes.
        """
        return float(crc32(repr(options).encode(), self._trail))

    def suffices(self, severity: float, how: Measure) -> bool:
        """Return whether a measurement that is not exact is enough to let the step through.

        Args:
            severity: Severity of the step by that measurement.
            how: How it was measured.

        Returns:
            Whether the severity is far enough below the limit.
        """
        return severity <= (ROUGH if how is Measure.ROUGHLY else NEAR) * self.limit

    def learn(
        self,
        step_norm: float,
        normalized_step: float,
        severity: float | None = None,
        *,
        is_exact: bool = True,
    ) -> None:
        """Take a measurement.

        Args:
            step_norm: Distance of the update that was measured.
            normalized_step: Its r.
            severity: Its severity, see ``StepController.severity``; None if that is r.
            is_exact: Whether it is neither a secant's nor of a part of the batch.
        """
        if not (step_norm > 0 and math.isfinite(normalized_step)):
            return
        severity = normalized_step if severity is None else severity
        self._note(step_norm, normalized_step, severity, is_exact)
        self._since_exact = 0 if is_exact else self._since_exact + 1
        # Beyond the radius, r by a secant is too small.
        is_right = is_exact or self._radii.latest * step_norm <= NEAR * self.limit
        if not is_right and self._deciding is self._radii:
            return
        before = self._deciding.largest
        if is_right:
            self._radii = self._radii.joined(normalized_step / step_norm)
        self._severities = self._severities.joined(severity / step_norm)
        growth = self._deciding.values[-1] / before if before > 0 else 1.0
        # A prediction that held makes the next ones last longer; one that fell short, shorter.
        has_held = growth <= self._margin
        longer, shorter = min(2 * self._interval, LONGEST_INTERVAL), max(self._interval // 8, 1)
        self._interval = longer if has_held else shorter
        self._margin = max(MARGIN, 0.8 * self._margin, 1.25 * growth)
        if self._usual.rows:
            self._measured.append(self._usual.rows[-1])
        self._since = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists."""
        return {
            "factors": list(self._radii.values),
            "severities": list(self._severities.values),
            "margin": self._margin,
            "steps": self._steps,
            "interval": self._interval,
            "since": self._since,
            "secants": self._since_exact,
            "usual": self._usual.state(),
            "measured": self._measured.state(),
            "trail": self._trail,
            "options": list(self._options),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned; if options differ, the next step is measured.

        Args:
            state: The state; it is not changed.
        """
        self._radii = _Factors(state["factors"])
        self._severities = _Factors(state.get("severities", state["factors"]))
        self._margin = state["margin"]
        self._steps = state["steps"]
        self._interval = state["interval"]
        self._since = state["since"]
        self._since_exact = state.get("secants", 0)  # which older checkpoints lack
        self._usual = _Window(WINDOW, state["usual"])
        self._measured = _Window(_RECENT, state["measured"])
        self._options = tuple(state.get("options", ()))  # which older checkpoints lack
        self._trail = state.get("trail", 0)

    def _note(self, *seen: float) -> None:
        self._trail = crc32(pack(f"{len(seen)}d", *seen), self._trail)

    @property
    def _deciding(self) -> _Factors:
        """Factors of the quantity that decides whether the next step passes."""
        return self._severities if self._passes_long_steps and not self._is_held else self._radii

    def _is_due(self, bound: float) -> bool:
        headroom = NEAR * self.limit / bound if bound > 0 else math.inf
        # Close to the limit r may be twice what it was before any signal shows it.
        share = headroom if headroom > 1 else headroom**4
        longest = min(AUDIT_INTERVAL * share, LONGEST_INTERVAL)
        return self._since >= min(self._interval, longest)

    def _is_unusual(self, signals: tuple[float, ...]) -> bool:
        usual, measured = self._usual.largest, self._measured.largest
        if len(usual) not in {0, len(signals)} or len(measured) not in {0, len(signals)}:
            self._usual, self._measured = _Window(WINDOW), _Window(_RECENT)
            return False
        # What is not a number is not below anything.
        return not (
            all(map(le, signals, [JUMP * seen for seen in usual]))
            and all(map(le, signals, [DRIFT * seen for seen in measured]))
        )


def direction_options(groups: Sequence[dict[str, Any]], count: int) -> tuple[float, ...]:
    """Return the options of an optimizer that turn the direction of an update when they change.

    Args:
        groups: Its parameter groups.
        count: Number of parameters that move.

    Returns:
        That number, and the learning rates in proportion to the first.
    """
    first, *others = (float(group.get("lr", math.nan)) for group in groups)
    shares = (round(rate / first, 1) if first else rate for rate in others)
    return (count, bool(first), *shares)


class _Factors:
    """r or severity per unit of distance, from the last measurements.

    Args:
        values: From the oldest to the latest; only the last 32 are kept.

    Attributes:
        latest: The largest of the latest few.
        largest: The largest of all without outliers, as a bad batch makes them.
    """

    def __init__(self, values: Sequence[float] = ()) -> None:
        self.values = tuple(values[-WINDOW:])
        self.latest = max(self.values[-_RECENT:], default=0.0)
        self.largest = max((f for f in self.values if f <= OUTLIER * self.latest), default=0.0)

    def joined(self, value: float) -> _Factors:
        """Return the factors and a new one, without the oldest if there are too many."""
        return _Factors((*self.values, value))


class _Window:
    """The latest signals, all of one length, and the largest of each.

    Args:
        size: How many.
        rows: The first ones.
    """

    def __init__(self, size: int, rows: Iterable[Sequence[float]] = ()) -> None:
        self.rows: deque[tuple[float, ...]] = deque(map(tuple, rows), maxlen=size)

    @property
    def largest(self) -> tuple[float, ...]:
        """The largest of each signal; empty before the first."""
        return tuple(map(max, zip(*self.rows, strict=True)))

    def append(self, signals: tuple[float, ...]) -> None:
        """Take signals in, and let the oldest go where there are too many."""
        self.rows.append(signals)

    def state(self) -> list[list[float]]:
        """Return the signals from the oldest to the latest, as lists."""
        return list(map(list, self.rows))
