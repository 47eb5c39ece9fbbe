"""Judge from one audit whether the gradient in use is that of the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto
from math import isnan, nan
from typing import Any

from torch import Tensor

from safestep._warn import RaisedOnPurpose
from safestep.guard.health import Health
from safestep.guard.rank_gradients import OUTSIDE, WINDOW
from safestep.measure.schedule import Schedule
from safestep.measure.second_gradient import SecondGradient
from safestep.measure.slopes import Slopes
from safestep.measure.update import Update

FIRST = 8  # matching steps, before which the ratio must be near 1
CEILING = 1e-3  # a clipped gradient has the largest norm of all, up to this share
CAUSE = 0.5  # share of the difference that the gradient in use makes if it is the cause
STEADY, IN_A_ROW = 0.01, 3  # so many factors that are so much alike are no clipping's


class Verdict(Enum):
    """What an audit says of the gradient in use."""

    MATCHES = auto()
    UNDECIDED = auto()
    DIFFERS = auto()  # from that of the loss as far as it is seen: wrong if it once matched
    WRONG = auto()


_MATCHES, _UNDECIDED = (Verdict.MATCHES, ""), (Verdict.UNDECIDED, "")


class GradientJudge:
    """Tell another gradient from rounding and clipping, as `GradientWatch` describes it.

    Args:
        names: Names of the parameters.
        again: Computes the gradient of an update once more; None where that is not possible.
    """

    def __init__(
        self, names: Mapping[Tensor, str], again: Callable[[Update], SecondGradient] | None
    ) -> None:
        self._names, self._again = names, again
        self._usual: deque[float] = deque(maxlen=WINDOW)  # differences at matching steps
        self._ceiling = 0.0  # the largest norm of an audited gradient
        self._factors: deque[float] = deque(maxlen=IN_A_ROW)  # since the latest match
        self._looks = Schedule(IN_A_ROW)

    def verdict(
        self, slopes: Slopes, update: Update, health: Health, *, is_explained: bool, is_known: bool
    ) -> tuple[Verdict, str]:
        """Judge the gradient of a step.

        Args:
            slopes: Of the loss along the update, which can be compared.
            update: The update.
            health: Sizes of the update, with the norm of the gradient that the optimizer used.
            is_explained: Whether ranks are known whose own gradient is wrong.
            is_known: Whether the gradient is known to be wrong since an earlier step.

        Returns:
            The verdict, and what speaks against the gradient.
        """
        norm = nan if update.is_sharded else health.gradient_norm  # NaN: any may be clipped
        is_at_ceiling = not abs(norm - self._ceiling) > CEILING * self._ceiling
        self._ceiling = max(self._ceiling, norm)
        if is_explained:  # the mean is off by a share of what those ranks are
            return _UNDECIDED
        if self._is_usual(slopes):
            return _MATCHES
        is_clipped = slopes.ratio < 1 and is_at_ceiling
        if is_known or is_clipped or not self._looks.is_due():
            return _UNDECIDED
        second = self._second_gradient(slopes, update)
        return self._by_ratio(slopes) if second is None else self._by(second, slopes, update)

    def match(self, slopes: Slopes) -> None:
        """Take note that the gradient is the loss's."""
        self._usual.append(abs(slopes.difference))
        self._factors.clear()
        self._looks.reset()

    def wait(self) -> None:
        """Look at fewer of the next steps."""
        self._looks.relax()

    def recent(self) -> tuple[list[float], dict[str, int]]:
        """Return what is known beside `state_dict`."""
        return list(self._factors), self._looks.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the run, as plain numbers and lists."""
        return {"usual": list(self._usual), "ceiling": self._ceiling}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._usual = deque(state["usual"], maxlen=WINDOW)
        self._ceiling = state["ceiling"]

    def _is_usual(self, slopes: Slopes) -> bool:
        if abs(slopes.difference) <= OUTSIDE * max(self._usual, default=0.0):
            return True
        return len(self._usual) < FIRST and slopes.is_near

    def _second_gradient(self, slopes: Slopes, update: Update) -> SecondGradient | None:
        if self._again is None or not slopes.is_agreed:
            return None
        try:
            return self._again(update)
        except Exception as error:  # out of memory, or a call that has no second backward pass
            if isinstance(error, RaisedOnPurpose):
                raise
            return None

    def _by(self, second: SecondGradient, slopes: Slopes, update: Update) -> tuple[Verdict, str]:
        whole = slopes.gradient - slopes.outputs
        is_cause = abs(slopes.gradient - second.slope) >= CAUSE * abs(whole)
        if not is_cause and not slopes.is_gross:
            return _MATCHES  # but for rounding
        if not is_cause:
            why = "a second backward pass gives the same gradient, forward mode another slope"
            return Verdict.DIFFERS, why
        if second.is_shrunk:
            return self._by_factor(second)
        if second.is_parallel:
            why = f"the whole gradient is {second.factor:.3g} times that of a second backward pass"
            return Verdict.WRONG, why
        name = self._names.get(update.params[second.place], "a parameter outside the model")
        return Verdict.DIFFERS, f"{name} differs most from a second backward pass"

    def _by_factor(self, second: SecondGradient) -> tuple[Verdict, str]:
        # A gradient that is shorter, as clipping makes it.
        self._looks.relax()
        self._factors.append(second.factor if second.is_parallel else nan)
        is_steady = max(self._factors) - min(self._factors) <= STEADY * second.factor
        if is_steady and len(self._factors) == IN_A_ROW:
            return Verdict.WRONG, "the gradient is shorter by one factor at every step"
        return _UNDECIDED

    def _by_ratio(self, slopes: Slopes) -> tuple[Verdict, str]:
        if not slopes.is_gross:
            return _UNDECIDED
        self._factors.append(slopes.ratio)
        *_, before, now = (nan, *self._factors)
        may_be_clipped = 0 < now < 1 and abs(now - before) > STEADY * now
        if isnan(before) or may_be_clipped:
            return _UNDECIDED
        return Verdict.DIFFERS, "a second gradient was not computed"
