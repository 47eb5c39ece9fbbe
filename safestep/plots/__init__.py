"""Draw a run, or radii, on matplotlib axes; may import capture and below."""

from safestep.plots.ladder import plot_ladder
from safestep.plots.radii import plot_binding_radius
from safestep.plots.steps import (
    plot_cost,
    plot_distribution,
    plot_learning_rate,
    plot_loss,
    plot_normalized_step,
    plot_prediction,
    plot_safe_zone,
)
from safestep.plots.workers import (
    HEATMAP_QUANTITIES,
    plot_consistency,
    plot_dispersion,
    plot_noise_scale,
    plot_worker_heatmap,
)

__all__ = [
    "HEATMAP_QUANTITIES",
    "plot_binding_radius",
    "plot_consistency",
    "plot_cost",
    "plot_dispersion",
    "plot_distribution",
    "plot_ladder",
    "plot_learning_rate",
    "plot_loss",
    "plot_noise_scale",
    "plot_normalized_step",
    "plot_prediction",
    "plot_safe_zone",
    "plot_worker_heatmap",
]
