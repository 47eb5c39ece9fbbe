"""Lightning callbacks, installed as ``safestep.callbacks``."""

from .step_safety import StepSafety
from .worker_consistency import WorkerConsistency

__all__ = ["StepSafety", "WorkerConsistency"]
