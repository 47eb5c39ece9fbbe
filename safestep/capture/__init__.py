"""Layer 1: which numbers of a training step enter a softmax."""

from safestep.capture.finder import LogitFinder, Logits, LogitsFn, describe, find_logits
from safestep.capture.plan import LogitsNotFoundError

__all__ = ["LogitFinder", "Logits", "LogitsFn", "LogitsNotFoundError", "describe", "find_logits"]
