"""Adapt the guard to Lightning and Hugging Face; may import all of safestep.

Installed as ``safestep.callbacks``. Each framework is imported when one of its names is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .step_safety import StepSafety
    from .worker_consistency import WorkerConsistency

__all__ = ["StepSafety", "WorkerConsistency"]

_MODULES = {"StepSafety": "step_safety", "WorkerConsistency": "worker_consistency"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
