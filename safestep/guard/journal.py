"""What the guard tells: the run log, warnings and lines of the Python logger."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from safestep._warn import warn_user
from safestep.guard.controller import StepReport
from safestep.parallel.collectives import rank, world_size
from safestep.runlog.writer import RunLog
from safestep.workers.drift import WorkerEvent

_logger = logging.getLogger("safestep")


class Journal:
    """Write down what happened, on rank 0 only.

    Args:
        run_dir: Directory of ``run.jsonl``; None writes none.
        settings: For the header of the run log.
        group: The workers of the run.
    """

    def __init__(
        self, run_dir: str | Path | None, settings: dict[str, Any], group: ProcessGroup | None
    ) -> None:
        self._is_writer = rank(group) == 0
        self._log = None
        if run_dir is not None and self._is_writer:
            self._log = RunLog(run_dir, settings, world_size(group))
        self._values: dict[str, Any] = {}
        self._interventions = 0
        self._warned: set[str] = set()
        self._introduced: str | None = None

    def note(self, values: dict[str, Any]) -> None:
        """Keep `values` for the next step's record."""
        self._values.update(values)

    def introduce(self, logits: str | None, step: int) -> None:
        """Say which logits are measured, when they are first found and when they change.

        Args:
            logits: One line about them.
            step: The step they were found at.
        """
        if logits is None or logits == self._introduced or not self._is_writer:
            return
        self._introduced = logits
        _logger.info("%s", logits)
        if self._log is not None:
            self._log.write("event", {"step": step, "name": "logits", "message": logits})

    def publish(self, report: StepReport) -> None:
        """Write the record of a step, and say so where the guard intervened or could not see.

        Args:
            report: The step's.
        """
        if self._log is not None:
            self._log.write("step", asdict(report) | {"time": time.time()} | self._values)
        self._values = {}
        if report.status == "unmeasured":
            self.warn_once(f"a step was not measured and left alone: {report.reason}")
        if report.status in ("clipped", "skipped"):
            self._tell(report)

    def warn_once(self, text: str) -> None:
        """Warn, unless the same was said before.

        Args:
            text: What happened and what to do.
        """
        if text in self._warned or not self._is_writer:
            return
        self._warned.add(text)
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
            "step %d: r = %.3g, radius %.3g, scaled by %.3g (row %s; intervention %d)",
            report.step, report.normalized_step, report.radius, report.scale, report.bottleneck,
            count,
        )  # fmt: skip
