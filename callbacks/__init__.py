"""Lightning callbacks, installed as ``safestep.callbacks``."""

from .step_safety import StepSafety

__all__ = ["StepSafety"]
