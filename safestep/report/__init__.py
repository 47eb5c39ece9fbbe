"""Tell what happened in a run, on one self-contained page; may import plots and below."""

from safestep.report.write import write_report

__all__ = ["write_report"]
