"""Adapt the guard to Lightning; installed as ``safestep.callbacks``; may import all of safestep."""

from .step_safety import StepSafety
from .worker_consistency import WorkerConsistency

__all__ = ["StepSafety", "WorkerConsistency"]
