"""Notice that the gradient an optimizer uses is no longer that of the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isnan, nan
from typing import Any
from zlib import crc32

from torch import Tensor

from safestep._warn import RaisedOnPurpose
from safestep.guard.gradient_event import TO_AUDIT, TO_REPAIR, TO_REPAIR_RANK, GradientEvent
from safestep.guard.health import Health
from safestep.guard.options import check_audit_interval
from safestep.guard.rank_gradients import OUTSIDE, WINDOW, RankGradients, words
from safestep.measure.audit import Schedule
from safestep.measure.second_gradient import SecondGradient
from safestep.measure.slopes import Slopes
from safestep.measure.update import Measurement, Update

FIRST = 8  # matching steps, before which the ratio must be near 1
CEILING = 1e-3  # a clipped gradient has the largest norm of all, up to this share
CAUSE = 0.5  # share of the difference that the gradient in use makes if it is the cause
STEADY, IN_A_ROW = 0.01, 3  # so many factors that are so much alike are no clipping's


class GradientWatch:
    """Tell a gradient that is not the loss's from rounding and from clipping.

    Audited are the exactly measured steps. Where the two slopes of the loss differ by more than
    three times what they did at the last 64 matching steps, the recorded calls and their backward
    passes run once more. The second gradient decides:

    - It is the gradient in use: backward and forward mode differ. An alarm, if not by rounding.
    - It is longer, as a whole or in each parameter, or was cut off at one size: clipping, of which
      the ratio is the factor. Three equal factors in a row are an alarm.
    - It is another one: an alarm, which names the parameter that differs most. Before the first
      match in a run it is none: the loss may have terms that do not pass through the outputs of the
      model. The run is then not audited until the two match.

    Without an interval nobody has said that the loss is one of the outputs alone: what would be an
    alarm is then only written down, and the run is not audited until the two match.

    Several ranks average their second gradients. Ranks of shards make none: ``fully_shard`` reduces
    gradients into ``.grad`` within the backward pass, where a second one would be added. There, an
    alarm takes two audited steps in a row whose ratio is off by more than 2 % (10 % in half
    precision); two equal ones if the ratio is below 1. Where WorkerMetrics keeps the gradients of
    DDP from before the all-reduce, `RankGradients` names the ranks whose own gradient is wrong.
    Under ``fully_shard`` no rank holds the whole update, so none is named.

    Args:
        interval: Audit at least one in so many steps; None adds none.
        tell: Takes each event.
        names: Names of the parameters.
        again: Computes the gradient of an update once more; None where that is not possible.

    Raises:
        ValueError: If `interval` is not a positive integer or None.
    """

    def __init__(
        self,
        interval: int | None,
        tell: Callable[[GradientEvent], None],
        names: Mapping[Tensor, str],
        again: Callable[[Update], SecondGradient] | None,
    ) -> None:
        check_audit_interval(interval)
        self._interval, self._tell, self._names, self._again = interval, tell, names, again
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._matched: int | None = None  # the latest step at which the slopes matched
        self._since: int | None = None  # the step from which on they do not
        self._ceiling = 0.0  # the largest norm of an audited gradient
        self._factors: deque[float] = deque(maxlen=IN_A_ROW)  # since the latest match
        self._obstacle: str | None = None  # why the ratio says nothing
        self._looks = Schedule(IN_A_ROW)
        self._ranks = RankGradients()

    def is_due(self, step: int) -> bool:
        """Return whether a step must be measured exactly.

        Args:
            step: Its number.
        """
        return self._interval is not None and step % self._interval == 0

    def audited(
        self, step: int, measurement: Measurement, update: Update, health: Health
    ) -> Measurement:
        """Judge the gradient of a step, and tell of it where there is an event.

        Args:
            step: The step's number.
            measurement: What was measured, agreed over the ranks.
            update: The update.
            health: Sizes of the update, with the norm of the gradient that the optimizer used.

        Returns:
            The measurement, without slopes whose ratio says nothing about the gradient.
        """
        slopes = measurement.slopes
        if not measurement.is_exact:
            return measurement
        self._judge_ranks(step, slopes.ranks)
        if slopes.reason is not None:
            return measurement
        norm = nan if update.is_sharded else health.gradient_norm  # NaN: any may be clipped
        is_at_ceiling = not abs(norm - self._ceiling) > CEILING * self._ceiling
        self._ceiling = max(self._ceiling, norm)
        if self._ranks.named:
            pass  # the cause is known, and the mean is off by a share of it
        elif self._is_usual(slopes):
            self._match(step, slopes)
        elif self._since is None and not (slopes.ratio < 1 and is_at_ceiling):
            self._examine(step, slopes, update)
        if self._obstacle is not None:
            measurement = replace(measurement, slopes=Slopes(obstacle=self._obstacle))
        return measurement

    def fingerprint(self, health: Health, mine: Measurement) -> float:
        """Return a number that is equal on ranks that will judge the next slopes alike.

        Args:
            health: Sizes of the update under way.
            mine: What this rank measured of it.
        """
        known = self.state_dict(), list(self._factors), self._obstacle, self._looks.state_dict()
        own = health.gradient_norm, mine.slopes.is_coarse
        return float(crc32(repr((known, own)).encode()))

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the run, as plain numbers and lists."""
        return {
            "usual": list(self._usual), "matched": self._matched, "since": self._since,
            "ceiling": self._ceiling, "ranks": self._ranks.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._usual = deque(state["usual"], maxlen=WINDOW)
        self._matched, self._since = state["matched"], state["since"]
        self._ceiling = state["ceiling"]
        if "ranks" in state:  # which older checkpoints lack
            self._ranks.load_state_dict(state["ranks"])

    def _is_usual(self, slopes: Slopes) -> bool:
        if abs(slopes.difference) <= OUTSIDE * max(self._usual, default=0.0):
            return True
        return len(self._usual) < FIRST and slopes.is_near

    def _match(self, step: int, slopes: Slopes) -> None:
        since, self._since, self._matched, self._obstacle = self._since, None, step, None
        self._usual.append(abs(slopes.difference))
        self._factors.clear()
        self._looks.reset()
        if since is not None:
            text = f"the gradient matches the loss again: ratio {slopes.ratio:.3g} at step {step}"
            self._tell(GradientEvent(step, since, "right", text))

    def _examine(self, step: int, slopes: Slopes, update: Update) -> None:
        if not self._looks.is_due():
            return
        second = None
        try:
            if self._again is not None and slopes.is_agreed:
                second = self._again(update)
        except Exception as error:  # out of memory, or a call that has no second backward pass
            if isinstance(error, RaisedOnPurpose):
                raise
        if second is None:
            self._doubt(step, slopes)
            return
        whole = slopes.gradient - slopes.outputs
        is_cause = abs(slopes.gradient - second.slope) >= CAUSE * abs(whole)
        if not (is_cause or slopes.is_gross):
            self._match(step, slopes)  # rounding
        elif not is_cause:
            why = "a second backward pass gives the same gradient, forward mode another slope"
            self._mismatch(step, slopes, why)
        elif second.is_shrunk:
            self._shrink(step, slopes, second)
        elif second.is_parallel:
            why = f"the whole gradient is {second.factor:.3g} times that of a second backward pass"
            self._alarm(step, slopes, why)
        else:
            name = self._names.get(update.params[second.place], "a parameter outside the model")
            self._mismatch(step, slopes, f"{name} differs most from a second backward pass")

    def _doubt(self, step: int, slopes: Slopes) -> None:
        """Judge without a second gradient."""
        if not slopes.is_gross:
            return
        self._factors.append(slopes.ratio)
        *_, before, now = (nan, *self._factors)
        may_be_clipped = 0 < now < 1 and abs(now - before) > STEADY * now
        if not (isnan(before) or may_be_clipped):
            self._mismatch(step, slopes, "a second gradient was not computed")

    def _shrink(self, step: int, slopes: Slopes, second: SecondGradient) -> None:
        self._looks.relax()
        self._factors.append(second.factor if second.is_parallel else nan)
        is_steady = max(self._factors) - min(self._factors) <= STEADY * second.factor
        if is_steady and len(self._factors) == IN_A_ROW:
            self._alarm(step, slopes, "the gradient is shorter by one factor at every step")

    def _mismatch(self, step: int, slopes: Slopes, why: str) -> None:
        if self._matched is not None:
            self._alarm(step, slopes, why)
            return
        self._looks.relax()
        is_new = self._obstacle is None
        self._obstacle = (
            f"the gradient is not that of the model's outputs from the start ({why}): the loss has "
            "terms that do not pass through them, or something changes the gradient on its way"
        )
        if is_new:
            advice = None if self._interval is None else TO_AUDIT
            text = f"the gradient is not audited: {self._obstacle}"
            self._tell(GradientEvent(step, step, "not audited", text, advice))

    def _alarm(self, step: int, slopes: Slopes, why: str) -> None:
        self._since, self._obstacle = step, None
        last = None if self._matched is None else f"it matched at step {self._matched}"
        others = filter(None, (why, self._ranks.why_unnamed(slopes), last))
        self._accuse(step, step, f"ratio {slopes} since step {step} ({'; '.join(others)})")

    def _accuse(self, step: int, since: int, found: str, ranks: tuple[int, ...] = ()) -> None:
        if self._interval is None:  # a penalty that grows from zero, gradient surgery: not asked
            self._obstacle = f"the gradient is no longer that of the model's outputs: {found}"
            text = f"the gradient is not audited: {self._obstacle}"
            self._tell(GradientEvent(step, since, "not audited", text, ranks=ranks))
            return
        text = f"gradient does not match the loss: {found}"
        advice = TO_REPAIR_RANK if ranks else TO_REPAIR
        self._tell(GradientEvent(step, since, "wrong", text, advice, ranks))

    def _judge_ranks(self, step: int, slopes: Sequence[Slopes]) -> None:
        """Name ranks, or tell that their gradients match again."""
        before = self._ranks.named
        self._ranks.judge(step, slopes)
        new = {rank: since for rank, since in self._ranks.named.items() if rank not in before}
        if new:
            self._accuse(step, min(new.values()), words(new, slopes), tuple(new))
        for rank in sorted(before.keys() - self._ranks.named.keys()):
            text = f"the gradient of rank {rank} matches its loss again at step {step}"
            self._tell(GradientEvent(step, before[rank], "right", text, ranks=(rank,)))
