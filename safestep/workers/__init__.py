"""Compare data-parallel workers before they are averaged; may import measure and below."""

from safestep.workers.metrics import WorkerMetrics, WorkerReport

__all__ = ["WorkerMetrics", "WorkerReport"]
