"""Layer 2: from an update that was just made to the numbers that decide about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan, pi

import torch
from torch import Tensor, nn

from safestep.capture import LogitsFn
from safestep.controller import Finding, Measurement, StepController
from safestep.gauge import EstimatorName, Gauge, Reading, Update
from safestep.inner_watch import InnerWatch
from safestep.norms import each_norm, joined, joint_norm
from safestep.predict import Predictor
from safestep.shards import local


class Meter:
    """Measure updates on one worker: norms always, the radius exactly or by prediction.

    Args:
        module: The root module of the recorded calls.
        names: Names of the parameters, for messages.
        controller: Knows which radius is wanted, and up to which limit.
        estimator: How the logit tangent is found.
        predictor: Spares exact measurements; None measures every update.
        logits: The user's way from an output to its logits.
        inside: Looks inside the model while it runs again.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[Tensor, str],
        controller: StepController,
        estimator: EstimatorName,
        predictor: Predictor | None,
        logits: LogitsFn | None,
        inside: InnerWatch | None = None,
    ) -> None:
        self._names = names
        self._controller = controller
        self._predictor = predictor
        self._gauge = Gauge(module, estimator, logits, inside)

    @property
    def logits_found(self) -> str | None:
        """One line that says which logits are measured; None before any were."""
        return self._gauge.finder.description

    def measure(self, update: Update, options: tuple[float, ...]) -> tuple[Measurement, Reading]:
        """Return what was measured and how; an obstacle is in the measurement's reason.

        Args:
            update: The update.
            options: What turns the direction of an update when it changes.

        Returns:
            The measurement, and the reading that it comes from.
        """
        gradients = [g for param in update.params if (g := param.grad) is not None]
        is_partial = update.is_sharded
        predictor = None if is_partial else self._predictor
        watched = [] if predictor is None else [s for call in update.calls for s in call.signals]
        gradients = list(map(local, gradients)) if is_partial else gradients
        norms = _Norms.of(update.parts(), gradients, watched)
        if predictor is not None:
            predicted = self._predict(predictor, norms, options)
            if predicted is not None and update.calls:
                return predicted, _PREDICTED
        reading, obstacle = self._read(update)
        # The one host synchronization of a measured step.
        step_norm, gradient_norm, (radius, spread, index) = norms.read(reading.row.unbind())
        finding = _finding(radius, step_norm, gradient_norm, obstacle)
        reason = self._reason(finding, obstacle, update)
        if finding is not Finding.MEASURED:
            return Measurement(finding, radius, spread, -1, step_norm, reason, is_partial), reading
        if self._predictor is not None:
            self._predictor.learn(step_norm, 1.0 / radius)
        found = Measurement(finding, radius, spread, int(index), step_norm, None, is_partial)
        return found, reading

    def _predict(
        self,
        predictor: Predictor,
        norms: _Norms,
        options: tuple[float, ...],
    ) -> Measurement | None:
        step_norm, gradient_norm, signals = norms.read(norms.signals)
        r = predictor.predict(step_norm, [gradient_norm, *map(abs, signals)], options)
        if r is None:
            return None
        return Measurement(Finding.MEASURED, 1.0 / r if r else inf, r * pi, -1, step_norm)

    def _read(self, update: Update) -> tuple[Reading, str | None]:
        nothing = Reading(torch.full((3,), nan, dtype=torch.float64), self._gauge.estimator)
        if not update.calls:
            return nothing, (
                "no gradient came back through a forward call of `model` since the last step; pass "
                "the module whose forward computes the logits, or tell the guard the whole step "
                "with guard.record(training_step, batch)"
            )
        try:
            reading = self._gauge.measure(update, self._controller.measure)
            return replace(reading, warning=reading.warning or self._gauge.finder.warning), None
        except Exception as error:  # training goes on; the report and a warning say what happened
            return nothing, _one_line(error)

    def _reason(self, finding: Finding, obstacle: str | None, update: Update) -> str | None:
        params = update.params
        if finding is Finding.GRADIENT_NOT_FINITE:
            where = self._first_not_finite(params, [param.grad for param in params])
        elif finding is Finding.UPDATE_NOT_FINITE:
            where = self._first_not_finite(params, update.change)
        else:
            return str(finding) if finding is Finding.MEASUREMENT_NOT_FINITE else obstacle
        return f"{finding}: {where}"

    def _first_not_finite(self, params: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> str:
        for param, tensor in zip(params, tensors, strict=True):
            if tensor is not None and not joint_norm([local(tensor)]).isfinite():
                return self._names.get(param, "a parameter outside the model")
        return "its norm overflows"


# No row: nothing was measured.
_PREDICTED = Reading(torch.empty(0), "predicted")


@dataclass(slots=True)
class _Norms:
    """Norms of parts of the update, of the gradient and of signals, on the device."""

    update: Sequence[Tensor]
    gradient: Sequence[Tensor]
    signals: Sequence[Tensor]

    @classmethod
    def of(
        cls, update: Sequence[Tensor], gradient: Sequence[Tensor], signals: Sequence[Tensor]
    ) -> _Norms:
        sizes = [signal for signal in signals if not signal.ndim]  # whose norm is their size
        norms = each_norm([*update, *gradient, *(signal for signal in signals if signal.ndim)])
        first, last = len(update), len(update) + len(gradient)
        return cls(norms[:first], norms[first:last], sizes + norms[last:])

    def read(self, others: Sequence[Tensor]) -> tuple[float, float, list[float]]:
        """Return the norm of the update, that of the gradient, and `others`, all at once."""
        scalars = [*others, *self.update, *self.gradient]
        if not scalars or scalars[0].is_cpu:  # nothing to wait for
            numbers = [scalar.item() for scalar in scalars]
        else:
            numbers = torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()
        begin = len(others)
        middle = begin + len(self.update)
        return joined(numbers[begin:middle]), joined(numbers[middle:]), numbers[:begin]


def _finding(
    radius: float, step_norm: float, gradient_norm: float, obstacle: str | None
) -> Finding:
    if not gradient_norm < inf:
        return Finding.GRADIENT_NOT_FINITE
    if not step_norm < inf:
        return Finding.UPDATE_NOT_FINITE
    if obstacle is not None:
        return Finding.UNMEASURED
    return Finding.MEASURED if radius == radius else Finding.MEASUREMENT_NOT_FINITE


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, RuntimeError) else f"{type(error).__name__}: {text}"
