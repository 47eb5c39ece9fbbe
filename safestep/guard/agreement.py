"""Let all ranks of a run decide on the same numbers, and notice when they no longer are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from safestep.guard.health import Health
from safestep.guard.optimizer_state import OptimizerState
from safestep.guard.options import check_replica_interval
from safestep.guard.setup import STAGES, demand_same_setup, names_and_shapes
from safestep.measure.second_gradient import Mean, SecondGradient
from safestep.measure.slopes import over_ranks, row_of
from safestep.measure.update import Finding, Measurement, Update
from safestep.parallel.checksum import checksum
from safestep.parallel.present import ABSENT
from safestep.parallel.ranks import Ranks
from safestep.parallel.shards import are_sharded
from safestep.radius.loss_change import mean_change
from safestep.workers.drift import WorkerEvent
from safestep.workers.local_gradients import own_gradients
from safestep.workers.replicas import ReplicaWatch


@dataclass(frozen=True, slots=True)
class Doubts:
    """Which cheaper ways to find r are ruled out for an update.

    Attributes:
        prediction: Whether only an exact measurement will do.
        secant: Whether a secant is ruled out.
        part: Whether measuring a part of the batch is ruled out.
        trail: A number that is equal on ranks that predict the same.
    """

    prediction: bool
    secant: bool
    part: bool
    trail: float = 0.0


class Agreement:
    """What the ranks say to each other in a step. A lone rank agrees with itself at no cost.

    Args:
        optimizer: The optimizer whose steps the ranks take together.
        ranks: The ranks.
        tell: Takes the event that a replica differs from the others.
        interval: At one in so many steps, compare parameters and optimizer state bit by bit.

    Raises:
        ValueError: If `interval` is not a positive integer or None, or given for shards.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ranks: Ranks,
        tell: Callable[[WorkerEvent], None],
        interval: int | None = None,
    ) -> None:
        self.ranks = ranks
        self.is_alone = ranks.size == 1
        self._optimizer, self._tell, self._interval = optimizer, tell, interval
        is_whole = not are_sharded(_params(optimizer))
        self.has_replicas = is_whole and not self.is_alone
        several = own_gradients if self.has_replicas else _own_of_shards
        self.own_gradients = None if self.is_alone else several
        check_replica_interval(interval, is_whole)
        self._reasons: tuple[int, list[str | None]] = -2, []  # step and texts of all ranks' reasons
        self._idle_at = -2  # latest step that no rank could measure, with no new reason
        # Ranks that train models of their own are never equal, and then no replicas of each other.
        self._updates = ReplicaWatch("update", is_trusted=False, has_size=True)
        self._params = ReplicaWatch("checksum of the parameters", is_trusted=False)
        self._state = ReplicaWatch("checksum of the optimizer state", is_trusted=False)

    @property
    def is_idle(self) -> bool:
        """Whether no rank could measure the last step, for the same reasons as the one before."""
        return self._idle_at == self.ranks.step - 1

    def begin_step(self, step: int, setup: Mapping[str, Any], names: Mapping[Tensor, str]) -> None:
        """Before the first step, compare what the ranks were asked to do.

        Args:
            step: The step's number.
            setup: What must be the same on every rank, by name.
            names: Names of the parameters.

        Raises:
            ValueError: If ranks differ, on every rank.
            RuntimeError: If a rank does not take part.
        """
        self.ranks.step = step
        if self.ranks.are_compared:
            return
        parameters = names_and_shapes(_params(self._optimizer), names)
        whole = {
            STAGES: self.ranks.stages(), **setup, "number of steps so far": step,
            "parameters": parameters,
        }  # fmt: skip
        demand_same_setup(whole, self.ranks)
        self.ranks.are_compared = True

    def health(self, health: Health, doubts: Doubts, *, are_parts: bool) -> tuple[Health, Doubts]:
        """Return the sizes of the batch of all ranks, and what any rank doubts.

        With these, all ranks predict the same or measure in the same way, and need not ask again:
        a rank that measured alone would wait for the others. They judge one batch, as the data of a
        single rank look unusual now and then: among many ranks, one would at every step.

        Args:
            health: The sizes of this rank.
            doubts: What this rank doubts.
            are_parts: Whether the norms are those of this rank's shard.

        Returns:
            The norms over all ranks, and the largest of each signal; the doubts of all ranks.
        """
        if self.is_alone:
            return health, doubts
        slots = [0.0] * _SLOTS  # as many on every rank
        for index, signal in enumerate(health.signals):
            # NaN is as unusual as infinity, and infinity stays the largest.
            slots[index % _SLOTS] = max(signal, slots[index % _SLOTS]) if signal == signal else inf
        sizes = [health.step_norm, health.fingerprint, health.gradient_norm]
        row = (*sizes, *astuple(doubts), *slots)
        rows = self.ranks.gather(row, "the norms of its update")
        self._compare(self._updates, rows[:, :2])
        norms = rows[:, :3].norm(dim=0) if are_parts else rows[:, :3].amax(0)
        step_norm, _, gradient_norm = norms.tolist()
        prediction, secant, part, trail, *signals = rows[:, 3:].amax(0).tolist()
        trails = rows[rows[:, 6] != ABSENT, 6]
        doubted = Doubts(
            bool(prediction) or bool((trails != trail).any()), bool(secant), bool(part)
        )
        return Health(step_norm, gradient_norm, tuple(signals), health.fingerprint), doubted

    def measurement(
        self, mine: Measurement, fingerprint: float = 0.0, state: float = 0.0
    ) -> Measurement:
        """Return the measurement that all ranks act on.

        Takes one small all-gather. Two more follow, with the reasons, if a rank met a new obstacle;
        the first tells all ranks whether one did.

        Args:
            mine: This rank's.
            fingerprint: That of its update.
            state: A number that is equal on ranks whose gradient audits know the same.

        Returns:
            The smallest radius and the gravest finding over the ranks.
        """
        if self.is_alone:
            return mine
        row = (
            mine.finding, mine.radius, mine.spread, mine.bottleneck, mine.step_norm, fingerprint,
            mine.loss.divergence, mine.loss.slope, mine.loss.weight, *row_of(mine.slopes, state),
            self._is_new(mine.reason),
        )  # fmt: skip
        rows = self.ranks.gather(row, "its measurement")
        findings, radii, _, _, step_norms = rows[:, :5].unbind(1)
        self._compare(self._updates, rows[:, 4:6])
        slopes = over_ranks(
            mine.slopes, rows[:, 9:-1].tolist(), are_parts=mine.is_partial,
            is_whole=not (findings == ABSENT).any(),
        )  # fmt: skip
        if not findings.any():  # all measured: thousands of ranks are not looked at one by one
            worst = _of_row(mine, rows[radii.argmin()].tolist())
        else:
            reasons = self._reasons_of_all(mine.reason, findings, is_new=bool(rows[:, -1].any()))
            everyone = [
                None if row[0] == ABSENT else replace(_of_row(mine, row), reason=reason)
                for row, reason in zip(rows.tolist(), reasons, strict=True)
            ]
            worst = worst_of(everyone)
        worst = replace(worst, loss=mean_change(mine.loss, rows[findings != ABSENT, 6:9]))
        if mine.is_partial:
            worst = replace(worst, step_norm=float(torch.linalg.vector_norm(step_norms)))
        return replace(worst, slopes=slopes, row=None)

    def _is_new(self, reason: str | None) -> bool:
        step, reasons = self._reasons
        return step != self.ranks.step - 1 or reasons[self.ranks.index] != reason

    def _reasons_of_all(
        self, reason: str | None, findings: Tensor, *, is_new: bool
    ) -> list[str | None]:
        """Return every rank's reason, asked for only if one is new."""
        step, reasons = self.ranks.step, self._reasons[1]
        if is_new:
            reasons = self.ranks.gather_texts(reason, "the reason of its finding")
        elif (findings == Finding.UNMEASURED).all():
            self._idle_at = step
        self._reasons = step, reasons
        return reasons

    def averaged(
        self, second: Callable[[Update, Mean | None], SecondGradient]
    ) -> Callable[[Update], SecondGradient] | None:
        """Return what computes the mean gradient of all ranks again; None if they hold shards.

        Args:
            second: Computes it; its second argument averages over the ranks.
        """
        if self.has_replicas or self.is_alone:
            mean = None if self.is_alone else self.ranks.mean
            return lambda update: second(update, mean)
        return None

    def end_step(self) -> None:
        """Compare replicas where it is time to."""
        if self.is_alone:
            return
        if self._interval is not None and (self.ranks.step + 1) % self._interval == 0:
            self._compare_bits()

    def _compare_bits(self) -> None:
        held = OptimizerState.of(self._optimizer)
        params, state = held.tensors[: len(held.params)], held.tensors[len(held.params) :]
        sums = [*checksum(params).tolist(), *checksum(state).tolist()]
        rows = self.ranks.gather(sums, "checksums of its parameters and optimizer state")
        self._compare(self._params, rows[:, :2])
        self._compare(self._state, rows[:, 2:])

    def _compare(self, watch: ReplicaWatch, rows: Tensor) -> None:
        event = watch.update(self.ranks.step, rows) if self.has_replicas else None
        if event is not None:
            self._tell(event)


_SLOTS = 3 * 8  # three signals each of eight outputs or micro-batches; those after share a slot


def worst_of(measurements: Sequence[Measurement | None]) -> Measurement:
    """Return what all ranks act on: the smallest radius and the gravest finding of any.

    Args:
        measurements: One of each rank, in their order; None of one that has no more data.

    Returns:
        The measurement that every rank decides on. Its reason names the rank; where ranks have
        other reasons, the first of each.
    """
    present = {rank: m for rank, m in enumerate(measurements) if m is not None}
    worst = max(present.values(), key=lambda measurement: measurement.finding)
    measured = [m for m in present.values() if m.finding is Finding.MEASURED]
    tightest = min(measured, key=lambda m: m.radius, default=worst)
    if worst.finding is Finding.MEASURED:
        return tightest
    first: dict[str, int] = {}  # rank that has a reason
    for rank, measurement in present.items():
        if measurement.finding is worst.finding:
            first.setdefault(str(measurement.reason or measurement.finding), rank)
    reason = "; ".join(f"rank {rank}: {reason}" for reason, rank in first.items())
    return replace(tightest, finding=worst.finding, reason=reason)


def _of_row(mine: Measurement, row: Sequence[float]) -> Measurement:
    finding, radius, spread, bottleneck, step_norm, *_ = row
    return replace(
        mine, finding=Finding(int(finding)), radius=radius, spread=spread,
        bottleneck=int(bottleneck), step_norm=step_norm, is_partial=False,
    )  # fmt: skip


def _own_of_shards(_: Sequence[Tensor]) -> NoReturn:
    raise LookupError("no rank that holds shards has both its own gradient and the whole update")


def _params(optimizer: Optimizer) -> list[Tensor]:
    """Return the trained parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
