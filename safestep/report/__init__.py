"""Layer 3: what happened in a run, in words, figures and one self-contained page."""

from safestep.report.command import write_report

__all__ = ["write_report"]
