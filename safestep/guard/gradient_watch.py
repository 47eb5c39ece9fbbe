"""Notice that the gradient an optimizer uses is no longer that of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

from torch import Tensor

from safestep.guard.gradient_event import TO_AUDIT, TO_REPAIR, TO_REPAIR_RANK, GradientEvent
from safestep.guard.gradient_judge import GradientJudge, Verdict
from safestep.guard.health import Health
from safestep.guard.options import check_audit_interval
from safestep.guard.rank_gradients import RankGradients, words
from safestep.measure.second_gradient import SecondGradient
from safestep.measure.slopes import Slopes
from safestep.measure.update import Measurement, Update


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
        self._interval, self._tell = interval, tell
        self._judge = GradientJudge(names, again)
        self._matched: int | None = None  # the latest step at which the slopes matched
        self._since: int | None = None  # the step from which on they do not
        self._obstacle: str | None = None  # why the ratio says nothing
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
        verdict, why = self._judge.verdict(
            slopes, update, health,
            is_explained=bool(self._ranks.named), is_known=self._since is not None,
        )  # fmt: skip
        if verdict is Verdict.MATCHES:
            self._match(step, slopes)
        elif verdict is Verdict.DIFFERS and self._matched is None:
            self._give_up(step, why)
        elif verdict in {Verdict.DIFFERS, Verdict.WRONG}:
            self._alarm(step, slopes, why)
        if self._obstacle is not None:
            measurement = replace(measurement, slopes=Slopes(obstacle=self._obstacle))
        return measurement

    def fingerprint(self, health: Health, mine: Measurement) -> float:
        """Return a number that is equal on ranks that will judge the next slopes alike.

        Args:
            health: Sizes of the update under way.
            mine: What this rank measured of it.
        """
        known = self.state_dict(), self._judge.recent(), self._obstacle
        own = health.gradient_norm, mine.slopes.is_coarse
        return float(crc32(repr((known, own)).encode()))

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the run, as plain numbers and lists."""
        return {
            **self._judge.state_dict(), "matched": self._matched, "since": self._since,
            "ranks": self._ranks.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._judge.load_state_dict(state)
        self._matched, self._since = state["matched"], state["since"]
        if "ranks" in state:  # which older checkpoints lack
            self._ranks.load_state_dict(state["ranks"])

    def _match(self, step: int, slopes: Slopes) -> None:
        since, self._since, self._matched, self._obstacle = self._since, None, step, None
        self._judge.match(slopes)
        if since is not None:
            text = f"the gradient matches the loss again: ratio {slopes.ratio:.3g} at step {step}"
            self._tell(GradientEvent(step, since, "right", text))

    def _give_up(self, step: int, why: str) -> None:
        """Audit no longer until the two match: the loss may have terms that are not seen."""
        self._judge.wait()
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
