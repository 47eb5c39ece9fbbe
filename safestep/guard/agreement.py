"""Let all ranks of a run decide on the same numbers, and notice when they no longer are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from safestep._warn import RaisedOnPurpose
from safestep.capture.failures import one_line
from safestep.guard.health import Health
from safestep.guard.optimizer_state import OptimizerState
from safestep.guard.options import check_replica_interval
from safestep.guard.rank_messages import (
    MeasurementMessage,
    RuledOut,
    SizesMessage,
    agreed_measurement,
    agreed_sizes,
)
from safestep.guard.setup import STAGES, demand_same_setup, names_and_shapes
from safestep.measure.second_gradient import Mean, SecondGradient
from safestep.measure.update import Finding, Measurement, Update
from safestep.parallel.checksum import checksum
from safestep.parallel.collectives import is_of_collective
from safestep.parallel.placements import Layout
from safestep.parallel.ranks import Ranks
from safestep.parallel.shards import are_sharded
from safestep.workers.drift import WorkerEvent
from safestep.workers.local_gradients import own_gradients
from safestep.workers.replicas import ReplicaWatch


class Agreement:
    """What the ranks say to each other in a step. A lone rank agrees with itself at no cost.

    Args:
        optimizer: The optimizer whose steps the ranks take together.
        ranks: The ranks.
        tell: Takes the event that a replica differs from the others.
        interval: At one in so many steps, compare parameters and optimizer state bit by bit.

    Raises:
        ValueError: If `interval` is not a positive integer or None, or given where no rank has a
            replica.
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
        params = _params(optimizer)
        self._are_whole, self._layout = not are_sharded(params), Layout.of(params)
        self.has_replicas = not self.is_alone and ranks.size > self._layout.num_shards
        several = own_gradients if self._are_whole else _refuse_shards
        self.own_gradients = None if self.is_alone else several
        check_replica_interval(interval, self._are_whole or self.has_replicas)
        self._copies = ranks.size / self._layout.num_ranks  # how often the sums over ranks count
        self._shards: Tensor | None = None  # which shard each rank holds, None if all hold one
        self._reasons: tuple[int, list[str | None]] = -2, []  # step and texts of all ranks' reasons
        self._idle_at = -2  # latest step that no rank could measure, with no new reason
        # Ranks that train models of their own are never equal, and then no replicas of each other.
        is_trusted = not self._are_whole and self._layout.is_declared
        self._updates = ReplicaWatch("update", is_trusted=is_trusted, has_size=True)
        self._params = ReplicaWatch("checksum of the parameters", is_trusted=is_trusted)
        self._state = ReplicaWatch("checksum of the optimizer state", is_trusted=is_trusted)

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
        if self.has_replicas and not self._are_whole:
            row = [self._layout.shard]
            self._shards = self.ranks.gather(row, "which shard it holds").flatten()
        self.ranks.are_compared = True

    def sizes(
        self, mine: Health, ruled_out: RuledOut, trail: float, *, are_parts: bool
    ) -> tuple[Health, RuledOut]:
        """Return the sizes of the batch of all ranks, and what any rank rules out.

        With these, all ranks predict the same or measure in the same way, and need not ask again:
        a rank that measured alone would wait for the others. They judge one batch, as the data of a
        single rank look unusual now and then: among many ranks, one would at every step.

        Args:
            mine: The sizes of this rank.
            ruled_out: What this rank rules out.
            trail: A number that is equal on ranks that predict the same.
            are_parts: Whether the norms are those of this rank's shard.

        Returns:
            The norms over all ranks, and the largest of each signal; what any of them rules out.
        """
        if self.is_alone:
            return mine, ruled_out
        message = SizesMessage.of(mine, ruled_out, trail)
        rows = self.ranks.gather(message.pack(), "the norms of its update")
        columns = SizesMessage.unpack(rows.unbind(1))
        self._compare(self._updates, columns.step_norm, columns.fingerprint)
        return agreed_sizes(mine, rows, copies=self._copies if are_parts else None)

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
        is_new = self._is_new(mine.reason)
        message = MeasurementMessage.of(mine, fingerprint, state, is_new=is_new)
        rows = self.ranks.gather(message.pack(), "its measurement")
        columns = MeasurementMessage.unpack(rows.unbind(1))
        self._compare(self._updates, columns.step_norm, columns.fingerprint)
        reasons: list[str | None] = []
        if columns.finding.any():
            is_any_new = bool(columns.is_new.any())
            reasons = self._reasons_of_all(mine.reason, columns.finding, is_new=is_any_new)
        if (columns.is_lost == 1).any():
            told = zip(columns.is_lost.tolist(), reasons, strict=True)
            causes = [f"rank {r}: {why}" for r, (is_lost, why) in enumerate(told) if not is_lost]
            raise self.ranks.missing("to run the model again", "; ".join(causes) or str(reasons[0]))
        copies = self._copies if mine.is_partial else None
        return agreed_measurement(mine, rows, reasons, copies)

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

    def obstacle(self, mine: str | None, *, is_due: bool) -> str | None:
        """Return why this rank does not measure: where ranks hold shards, none does so alone.

        Args:
            mine: What stands in the way on this rank, None if nothing does.
            is_due: Whether it would try.
        """
        if self.is_alone or self._are_whole:
            return mine
        what = "whether it can run the model again"
        (can,) = self.ranks.all_are(mine is None and is_due, what=what)
        is_held_up = is_due and not can
        return mine or ("another rank cannot run the model again" if is_held_up else None)

    def failure(self, error: Exception) -> tuple[str, bool]:
        """Return why a measurement failed, and whether another rank left this one waiting.

        Args:
            error: What it raised.

        Raises:
            RaisedOnPurpose: If a rank did not say how it went.
        """
        if isinstance(error, RaisedOnPurpose):
            raise error
        return one_line(error), is_of_collective(error)

    def averaged(
        self, second: Callable[[Update, Mean | None], SecondGradient]
    ) -> Callable[[Update], SecondGradient] | None:
        """Return what computes the mean gradient of all ranks again; None if they hold shards.

        Args:
            second: Computes it; its second argument averages over the ranks.
        """
        if self._are_whole or self.is_alone:
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
        columns = rows.unbind(1)
        self._compare(self._params, *columns[:2])
        self._compare(self._state, *columns[2:])

    def _compare(self, watch: ReplicaWatch, *columns: Tensor) -> None:
        """Tell of a rank whose numbers in these columns, each of shape ``[N]``, differ."""
        if not self.has_replicas:
            return
        event = watch.update(self.ranks.step, torch.stack(columns, dim=1), self._shards)
        if event is not None:
            self._tell(event)


def _refuse_shards(_: Sequence[Tensor]) -> NoReturn:
    raise LookupError("no rank that holds shards has both its own gradient and the whole update")


def _params(optimizer: Optimizer) -> list[Tensor]:
    """Return the trained parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
