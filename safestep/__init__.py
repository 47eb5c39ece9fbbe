"""Step-size safety controller and diagnostics for PyTorch training."""

from safestep.controller import StepReport
from safestep.dispersion import worker_dispersion
from safestep.estimators import logits_jvp
from safestep.exact import exact_radius
from safestep.optim import SafeStep
from safestep.radius import certified_radius, closed_form_radius, logit_spread, radius_bound
from safestep.runlog.reader import read_run

__all__ = [
    "SafeStep",
    "StepReport",
    "certified_radius",
    "closed_form_radius",
    "exact_radius",
    "logit_spread",
    "logits_jvp",
    "radius_bound",
    "read_run",
    "worker_dispersion",
]
