"""Layer 3: the run directory, written while a run goes on and read back as numpy columns."""

from safestep.runlog.reader import Run, read_run
from safestep.runlog.writer import RunLog

__all__ = ["Run", "RunLog", "read_run"]
