"""Record a training step, run it again and find its logits; may import runlog and below."""

from safestep.capture.finder import LogitFinder, LogitsFn, find_logits
from safestep.capture.logits import Logits, describe
from safestep.capture.plan import LogitsNotFoundError

__all__ = ["LogitFinder", "Logits", "LogitsFn", "LogitsNotFoundError", "describe", "find_logits"]
