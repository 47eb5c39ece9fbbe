"""Write the run directory and read it back as numpy columns; may import parallel and below."""

from safestep.runlog.reader import Run, read_run
from safestep.runlog.writer import RunLog

__all__ = ["Run", "RunLog", "read_run"]
