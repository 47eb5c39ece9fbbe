"""Step-size safety controller and diagnostics for PyTorch training."""

from safestep.guard.safe_step import SafeStep
from safestep.guard.step_report import StepReport
from safestep.measure.estimators import logits_jvp
from safestep.radius.bounds import certified_radius, closed_form_radius, logit_spread, radius_bound
from safestep.radius.divergence import linearized_divergence
from safestep.radius.exact import exact_radius
from safestep.runlog.reader import read_run
from safestep.workers.dispersion import worker_dispersion

__all__ = [
    "SafeStep",
    "StepReport",
    "certified_radius",
    "closed_form_radius",
    "exact_radius",
    "linearized_divergence",
    "logit_spread",
    "logits_jvp",
    "radius_bound",
    "read_run",
    "worker_dispersion",
]
