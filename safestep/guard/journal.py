"""What the guard tells: the run log, warnings and lines of the Python logger."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from functools import lru_cache
from math import isnan
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from torch.distributed import ProcessGroup

from safestep._warn import warn_user
from safestep.guard.gradient_event import GradientEvent
from safestep.guard.step_report import StepReport
from safestep.parallel.collectives import rank, world_size
from safestep.runlog.writer import RunLog
from safestep.workers.drift import WorkerEvent

_logger = logging.getLogger("safestep")

_REPORT_FIELDS = tuple(field.name for field in fields(StepReport))
_RESERVED = {
    *_REPORT_FIELDS, "kind", "run", "time", "head", "radii", "binding", "radii_reason",
}  # fmt: skip
_SELDOM = ("divergence", "loss_slope", "gradient_ratio")
_CHANGING = re.compile(r"0x[0-9a-f]+|\d+")  # addresses and numbers in the texts of errors
_MAX_WARNINGS = 20


class Journal:
    """Write down what happened, on rank 0 only.

    Args:
        run_dir: Directory of ``run.jsonl``; None writes none.
        settings: For the header of the run log.
        group: The workers of the run.
        owners: What is trained; guards of the same parameters share a run.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        settings: dict[str, Any],
        group: ProcessGroup | None,
        owners: Iterable[Tensor] | None = None,
    ) -> None:
        self._is_writer = rank(group) == 0
        self._log = None
        if run_dir is not None and self._is_writer:
            self._log = RunLog(run_dir, settings, world_size(group), owners=owners)
        self._values: dict[str, Any] = {}
        self._interventions = 0
        self._warned: set[str] = set()
        self._introduced: str | None = None

    @property
    def run(self) -> str | None:
        """Id of the run, None where this process writes no log."""
        return None if self._log is None else self._log.run

    @property
    def loss(self) -> Any:
        """The loss logged for the step under way, None without."""
        return self._values.get("loss")

    def resume(self, run: str | None) -> None:
        """Go on with the run of a checkpoint.

        Args:
            run: Its id.
        """
        if self._log is not None:
            self._log.resume(run)

    def log(self, values: dict[str, Any]) -> None:
        """Check a user's values and keep them for the next step's record.

        Args:
            values: One number or text each.

        Raises:
            ValueError: If a name is one of the record's own, or a value cannot be written.
        """
        self._values.update({name: _checked(name, value) for name, value in values.items()})

    def note(self, values: dict[str, Any]) -> None:
        """Keep the guard's own values for the next step's record."""
        self._values.update(values)

    def note_radii(self, radii: dict[str, Any]) -> None:
        """Keep the radii inside the model for the next step's record, and warn of missing ones."""
        self.note(radii)
        for kind, reason in radii.get("radii_reason", {}).items():
            self.warn_once(f"the {kind} radius is not measured: {reason}")

    def introduce(self, logits: str | None, step: int) -> None:
        """Say which logits are measured, when they are first found and when they change.

        Args:
            logits: One line about them.
            step: The step they were found at.
        """
        if logits is None or logits == self._introduced or not self._is_writer:
            return
        self._introduced = logits
        self.tell("logits", logits, step)

    def tell(self, name: str, message: str, step: int) -> None:
        """Write an event into the run log and a line of the Python logger.

        Args:
            name: Its kind.
            message: What happened.
            step: The step it happened at.
        """
        if self._is_writer:
            _logger.info("%s", message)
        if self._log is not None:
            self._log.write("event", {"step": step, "name": name, "message": message})

    def publish(self, report: StepReport) -> None:
        """Write the record of a step, and say so where the guard intervened or could not see.

        Args:
            report: The step's.
        """
        values, self._values = self._values, {}
        if self._log is not None:
            own = {name: getattr(report, name) for name in _REPORT_FIELDS}
            for name in _SELDOM:  # NaN at most steps, where null is written faster
                own[name] = None if isnan(own[name]) else own[name]
            self._log.write("step", {**own, "time": time.time(), **values})
        if report.status == "unmeasured":
            self.warn_once(f"a step was not measured and left alone: {report.reason}")
        if report.status in ("clipped", "skipped"):
            self._tell(report)
        if report.status == "rolled back":
            self.tell_rollback(report)

    def tell_rollback(self, report: StepReport) -> None:
        """Write that a run went back; what is written from here on repeats steps.

        Args:
            report: The step's that was the latest.
        """
        self.tell("rolled back", f"after step {report.step}: {report.reason}", report.step)

    def warn_once(self, text: str) -> None:
        """Warn, unless the same was said before, whatever the numbers in it.

        Args:
            text: What happened and what to do.
        """
        kind = _kind(text)
        if kind in self._warned or len(self._warned) > _MAX_WARNINGS or not self._is_writer:
            return
        self._warned.add(kind)
        if len(self._warned) > _MAX_WARNINGS:
            text = "no more warnings of this guard; the reasons are in guard.last and the run log"
        warn_user(f"SafeStep: {text}.")

    def tell_drift(self, event: WorkerEvent) -> None:
        """Write down and warn that a replica differs from the others.

        Args:
            event: Which, and since when.
        """
        if self._log is not None:
            self._log.write("event", {"name": "worker", **asdict(event)})
        self.warn_once(
            f"{event.message}. Their parameters or optimizer state are no longer the same: compare "
            "the ranks' checkpoints, and go on from one of them"
        )

    def tell_gradient(self, event: GradientEvent) -> None:
        """Write down what an audit of the gradient showed, and warn where there is something to do.

        Args:
            event: What it showed.
        """
        if self._log is not None:
            record = {key: value for key, value in asdict(event).items() if key != "advice"}
            self._log.write("event", {"name": "gradient", **record})
        if event.advice is not None:
            self.warn_once(f"{event.message}. {event.advice}")

    def close(self) -> None:
        """Close the run log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _tell(self, report: StepReport) -> None:
        self._interventions += 1
        # Ten lines, then one at every power of two: a held spike must not fill the disk.
        count = self._interventions
        if not self._is_writer or (count > 10 and count & (count - 1)):
            return
        if report.status == "skipped":
            _logger.info("step %d was not taken: %s", report.step, report.reason)
            return
        _logger.info(
            "step %d: r = %.3g, radius %.3g, scaled by %.3g (row %s; intervention %d%s)",
            report.step, report.normalized_step, report.radius, report.scale, report.bottleneck,
            count, f"; {report.reason}" if report.reason else "",
        )  # fmt: skip


@lru_cache(maxsize=32)  # the same reason comes at step after step
def _kind(text: str) -> str:
    return _CHANGING.sub("#", text)


def _checked(name: str, value: Any) -> Any:
    # As it can be written, or an error. What lies on a device is not waited for.
    if name in _RESERVED:
        raise ValueError(
            f"SafeStep.log: expected a name that is not the record's own, got `{name}`. "
            f"Choose another, such as `my_{name}`."
        )
    if value is None or isinstance(value, str):
        return _text(name, value)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            _refuse(name, f"a tensor of shape {tuple(value.shape)} and {value.dtype}")
        value = value.detach().reshape(())
        return value if value.device.type != "cpu" else value.item()
    try:
        value = value.item() if hasattr(value, "item") else value
        return value if isinstance(value, (bool, int)) and abs(value) < 2**63 else float(value)
    except (TypeError, ValueError, OverflowError):
        _refuse(name, f"a {type(value).__name__}: {str(value)[:40]}")


def _text(name: str, value: str | None) -> str | None:
    if name == "loss" and value is not None:
        _refuse(name, f"the text {value[:40]!r}")
    return value


def _refuse(name: str, got: str) -> NoReturn:
    raise ValueError(
        f"SafeStep.log: expected `{name}` to be one number, a tensor of one element or a text, got "
        f"{got}. Log several values under several names."
    )
