"""The radii of a step, of the output's softmax and inside the model, and which is smallest."""

from __future__ import annotations

import math
from typing import Any

import torch

from safestep.measure.inner_radii import InnerWatch
from safestep.measure.update import Estimator, Measurement

_UNSEEN = {
    "attention": "no call of scaled_dot_product_attention, and no softmax that weighs a matrix",
    "ffn": "no call of a ReLU-like activation function of torch",
}


def radii_of_step(watch: InnerWatch, measurement: Measurement, step_norm: float) -> dict[str, Any]:
    """Return the radii of a step, as parameter distances, and which of them is the smallest.

    To be comparable, all are bounds of one kind: the output's is always pi / spread, whichever rung
    decides about the step. They cover this worker's examples only.

    Args:
        watch: Holds the radii seen inside the model since the last call of ``take``.
        measurement: This worker's measurement at the model's output.
        step_norm: 2-norm of the update.

    Returns:
        The entries of the run log: ``radii`` has "output" and, by layer, "attention" and "ffn" if
        they were measured; ``binding`` names the smallest, None if no radius is finite or one is
        NaN; ``radii_reason`` says why a requested radius is missing. Empty if the radius of the
        step was not measured.

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Sec. 6.6.

    Example:
        >>> watch = InnerWatch(torch.nn.ReLU(), ["ffn"])
        >>> measurement = Measurement(Estimator.JVP, radius=0.5, spread=2 * math.pi)
        >>> radii_of_step(watch, measurement, step_norm=3.0)["radii"]
        {'output': 1.5}
    """
    inside = watch.take()
    if math.isnan(measurement.radius) or math.isnan(measurement.spread):
        return {}
    is_exact = measurement.estimator is Estimator.JVP
    if not is_exact:  # left by an exact attempt that failed half-way
        inside = {}
    found = [(kind, layer, radius) for kind in inside for layer, radius in inside[kind].items()]
    numbers = torch.stack([r.double() for _, _, r in found]).tolist() if found else []
    bound = math.pi / measurement.spread if measurement.spread else math.inf
    output, *rest = (math.inf if math.isinf(r) else r * step_norm for r in (bound, *numbers))
    radii: dict[str, Any] = {"output": output}
    for (kind, layer, _), radius in zip(found, rest, strict=True):
        radii.setdefault(kind, {})[layer] = radius
    record: dict[str, Any] = {"radii": radii, "binding": _smallest(radii)}
    reasons = {
        kind: reason if is_exact else "only the estimator 'jvp' sees it"
        for kind, reason in _UNSEEN.items()
        if kind in watch.wanted and kind not in radii
    }
    return record | ({"radii_reason": reasons} if reasons else {})


def _smallest(radii: dict[str, Any]) -> str | None:
    named = [
        (radius, kind)
        for kind, layers in radii.items()
        for radius in (layers.values() if isinstance(layers, dict) else [layers])
    ]
    if any(math.isnan(radius) for radius, _ in named):
        return None
    radius, kind = min(named)
    return kind if radius < math.inf else None
