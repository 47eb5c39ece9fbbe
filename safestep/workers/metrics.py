"""Measure how far the workers of data-parallel training disagree, step by step."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from safestep.parallel.collectives import rank
from safestep.runlog.writer import RunLog
from safestep.workers.ddp import DdpWorkers
from safestep.workers.dispersion import WorkerDispersion, WorkerSums, dispersion_from_sums
from safestep.workers.drift import WorkerEvent, WorkerWatch
from safestep.workers.fsdp import FsdpWorkers
from safestep.workers.kinds import Workers
from safestep.workers.micro_batches import MicroBatches
from safestep.workers.replicas import ReplicaWatch

_logger = logging.getLogger("safestep")

# A loss scale of 2^16 can halve 16 times before it is 1: overflows in that search are normal.
_SCALER_PATIENCE = 20


class Scaler(Protocol):
    """The part of ``torch.amp.GradScaler`` that is used."""

    def get_scale(self) -> float:
        """Return the factor on the loss, 1 when disabled."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One step's numbers, the same on every rank. Per-worker values are in rank order.

    ``loss``, ``grad_norm`` and ``cosine_to_mean`` are per worker; the other numbers, and
    ``outlier``, are those of `WorkerDispersion`. ``events`` holds the new events.

    Where ranks accumulate gradients, ``micro_loss`` and ``micro_grad_norm`` hold, for each
    micro-batch, the loss and the gradient norm of every rank; else nothing. A norm that no rank
    ever sees, as under ``fully_shard`` if only the last backward reduces, is NaN.
    """

    step: int
    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    cosine_to_mean: tuple[float, ...]
    loss_std: float
    loss_range: float
    grad_norm_std: float
    grad_norm_cv: float
    pairwise_cosine: float
    noise_scale: float
    outlier: int | None
    events: tuple[WorkerEvent, ...] = ()
    micro_loss: tuple[tuple[float, ...], ...] = ()
    micro_grad_norm: tuple[tuple[float, ...], ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the numbers as the "workers" record of a run log."""
        record = asdict(self)
        for name in ("events", "micro_loss", "micro_grad_norm"):
            del record[name]
        return record

    def micro_records(self) -> list[dict[str, Any]]:
        """Return the numbers of each micro-batch as a "micro" record of a run log."""
        pairs = enumerate(zip(self.micro_loss, self.micro_grad_norm, strict=True))
        return [
            {"step": self.step, "micro": index, "loss": loss, "grad_norm": norm}
            for index, (loss, norm) in pairs
        ]


class WorkerMetrics:
    """Measure each worker's loss and gradient before they are averaged, and name deviating workers.

    Under DDP, also report replicas whose parameters differ in any bit, found by checksums that are
    exchanged with the other numbers.

    Workers are the ranks of a `DistributedDataParallel` model or of one that ``fully_shard``
    distributed over a mesh of one dimension, or the micro-batches of gradient accumulation in a
    single process. Call `record` right after each backward, before gradients
    are clipped or unscaled. Training stays bitwise the same.

    Under DDP, a SafeStep on the same parameters audits each worker's own gradient, which is kept
    here, and names the ranks whose gradient is not that of their loss: see `audit_interval` there.

    The mean gradient is the one that DDP computes. A comm hook that compresses changes
    ``cosine_to_mean`` and adds to ``noise_scale``; the other numbers do not change.

    With gradient accumulation on several ranks, call it after each backward. The losses of all
    micro-batches, and their gradient norms where a rank sees them, are exchanged and logged at the
    end of a step. Divide each loss by the number of micro-batches before backward, as usual.

    Under DDP every rank must call `record`, so it does not work inside ``ddp.join()``. Zero the
    gradients after each reduction: a second reduction on top of the first mixes the mean into the
    workers' own gradients.

    Args:
        model: A DDP model, compiled or not, a model of ``fully_shard``, or any other module for
            micro-batches.
        every: Number of optimizer steps from one measurement to the next.
        pairwise_every: Number of measured steps from one pairwise cosine to the next; the steps in
            between report NaN. It takes an all-reduce of the size of the gradients. Micro-batches,
            shards, and two workers without a comm hook need no all-reduce and always report it.
        micro_batches: Number of backward passes in a step, if the model is not distributed.
        num_examples: Number of examples in a worker's batch, the unit of the noise scale.
        scaler: The loss scaler, if the loss is scaled.
        run_dir: Directory of ``run.jsonl``, written by rank 0.

    Raises:
        ValueError: If a count is less than 1, or if the model is distributed by something other
            than DDP or ``fully_shard`` over one mesh.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> metrics = WorkerMetrics(model, micro_batches=4)
        >>> for batch in torch.randn(4, 8, 3):
        ...     loss = model(batch).square().mean()
        ...     (loss / 4).backward()
        ...     report = metrics.record(loss)
        >>> len(report.grad_norm)
        4
    """

    def __init__(
        self,
        model: Module,
        *,
        every: int = 1,
        pairwise_every: int = 10,
        micro_batches: int = 1,
        num_examples: int = 1,
        scaler: Scaler | None = None,
        run_dir: str | Path | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "every": every, "pairwise_every": pairwise_every, "num_examples": num_examples,
        }  # fmt: skip
        for name, value in {**settings, "micro_batches": micro_batches}.items():
            if value < 1:
                raise ValueError(
                    f"WorkerMetrics: expected `{name}` of at least 1, got {value}. Give a count."
                )
        self.step = 0
        self.last: WorkerReport | None = None
        self._every, self._pairwise_every, self._num_examples = every, pairwise_every, num_examples
        self._scaler = scaler
        self._workers = _workers_of(model, micro_batches)
        # Only ranks are watched: the index of a micro-batch within a step means nothing over time.
        self._watch = (
            WorkerWatch(
                self._workers.num_workers,
                non_finite_patience=0 if scaler is None else _SCALER_PATIENCE,
            )
            if self._workers.are_ranks
            else None
        )
        self._replicas = ReplicaWatch("checksum of the parameters", is_trusted=True)
        self._log: RunLog | None = None
        self._is_first_rank = rank() == 0
        if run_dir is not None and self._is_first_rank:
            kind = "ranks" if self._workers.are_ranks else "micro-batches"
            settings["workers"] = kind
            self._log = RunLog(
                run_dir, settings, self._workers.num_workers, owners=model.parameters()
            )

    def record(self, loss: Tensor, *, is_last: bool | None = None) -> WorkerReport | None:
        """Add the loss and gradient of one backward; return a report at the end of a measured step.

        Args:
            loss: The mean loss of this worker's (micro-)batch, not scaled and not divided by the
                number of micro-batches. Shape ``[]``.
            is_last: Whether this backward ended the step. By default, a backward that DDP reduced
                or the last of ``micro_batches`` ends it.

        Returns:
            The step's report, the same on every rank; None within a step and after a step that was
            not measured.
        """
        self._workers.add(loss)
        if not self._workers.is_complete(is_last):
            return None
        report = self._report() if self._is_measured else None
        self.step += 1
        self._workers.begin_step(is_measured=self._is_measured)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and the evidence against each worker."""
        return {
            "step": self.step,
            "num_workers": self._workers.num_workers,
            "watch": self._watch.state_dict() if self._watch else None,
            "run": self._log.run if self._log else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; drop the evidence if the number of workers changed.

        Args:
            state: A result of `state_dict`; it is not changed.
        """
        if self._log:
            self._log.resume(state.get("run"))
        self.step = state["step"]
        self._workers.begin_step(is_measured=self._is_measured)
        if self._watch and state["num_workers"] == self._workers.num_workers and state["watch"]:
            self._watch.load_state_dict(state["watch"])

    def detach(self) -> None:
        """Remove every hook from the model and close the log."""
        self._workers.detach()
        if self._log:
            self._log.close()

    @property
    def _is_measured(self) -> bool:
        return self.step % self._every == 0

    def _report(self) -> WorkerReport:
        with_pairs = self.step // self._every % self._pairwise_every == 0
        scale = self._scaler.get_scale() if self._scaler else 1.0
        losses, sums = self._workers.sums(scale, with_pairs=with_pairs)
        dispersion = dispersion_from_sums(losses, sums, num_examples=self._num_examples)
        self.last = report = self._to_report(losses, sums, dispersion)
        if self._is_first_rank:
            self._tell(report)
        return report

    def _tell(self, report: WorkerReport) -> None:
        if self._log:
            self._log.write("workers", report.record())
            for record in report.micro_records():
                self._log.write("micro", record)
        for event in report.events:
            _logger.warning("step %d: %s", event.step, event.message)
            if self._log:
                self._log.write("event", {"name": "worker", **asdict(event)})

    def _to_report(
        self, losses: Tensor, sums: WorkerSums, dispersion: WorkerDispersion
    ) -> WorkerReport:
        loss, norm = losses.tolist(), sums.squared_norms.sqrt().tolist()
        cosine = dispersion.cosine_to_mean.tolist()
        events = self._watch.update(self.step, loss, norm, cosine) if self._watch else []
        if self._workers.checksums is not None:
            drifted = self._replicas.update(self.step, self._workers.checksums)
            events += [drifted] if drifted else []
        micro = self._workers.micro
        return WorkerReport(
            step=self.step,
            loss=tuple(loss),
            grad_norm=tuple(norm),
            cosine_to_mean=tuple(cosine),
            loss_std=dispersion.loss_std.item(),
            loss_range=dispersion.loss_range.item(),
            grad_norm_std=dispersion.grad_norm_std.item(),
            grad_norm_cv=dispersion.grad_norm_cv.item(),
            pairwise_cosine=dispersion.pairwise_cosine.item(),
            noise_scale=dispersion.noise_scale.item(),
            outlier=dispersion.outlier,
            events=tuple(events),
            micro_loss=() if micro is None else _rows(micro.losses),
            micro_grad_norm=() if micro is None else _rows(micro.grad_norms),
        )


def _rows(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table.tolist()))


def _workers_of(model: Module, micro_batches: int) -> Workers:
    """Return the workers that train this model.

    Raises:
        ValueError: If the model is distributed, but not by DDP or fully_shard over one mesh.
    """
    model = getattr(model, "_orig_mod", model)  # unwraps torch.compile
    if isinstance(model, DistributedDataParallel):
        return DdpWorkers(model)
    # Checks an attribute because importing DTensor takes over a second.
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        return FsdpWorkers(model)
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters()):
        raise ValueError(
            "WorkerMetrics: expected `model` to be distributed by DistributedDataParallel or "
            "fully_shard, got FullyShardedDataParallel, which reduces gradients inside backward "
            "and shows them to nobody before. Shard with torch.distributed.fsdp.fully_shard."
        )
    return MicroBatches(model, micro_batches)
