"""Layer 3: what the workers of data-parallel training say before they are averaged."""

from safestep.workers.metrics import WorkerMetrics, WorkerReport

__all__ = ["WorkerMetrics", "WorkerReport"]
