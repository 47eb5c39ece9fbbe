"""From an update that was just made to the numbers that decide about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan, pi

import torch
from torch import Tensor, nn

from safestep.capture import LogitsFn
from safestep.guard.controller import Finding, Measurement, StepController
from safestep.guard.predictor import Predictor
from safestep.measure.cross_check import EstimatorName, Gauge, Reading, Update
from safestep.measure.inner_radii import InnerWatch
from safestep.parallel.norms import each_norm, joined, joint_norm
from safestep.parallel.shards import local

# Takes the numbers of this worker and returns those of all, a row for each.
Gather = Callable[[Sequence[float]], Tensor]


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
        self._norms: _Norms | None = None
        self._gauge = Gauge(module, estimator, logits, inside)

    @property
    def logits_found(self) -> str | None:
        """One line that says which logits are measured; None before any were."""
        return self._gauge.finder.description

    def measure(
        self, update: Update, options: tuple[float, ...], gather: Gather | None = None
    ) -> tuple[Measurement, Reading]:
        """Return what was predicted or measured, and how.

        Args:
            update: The update.
            options: What turns the direction of an update when it changes.
            gather: Where there are several workers: returns the numbers of every worker as rows.
                All predict from the same numbers, and all measure where one would: the others would
                wait for it, or it for shards that no other gathers.

        Returns:
            The measurement, and the reading that it comes from. An obstacle is in its reason.
        """
        gradients = [g for param in update.params if (g := param.grad) is not None]
        is_partial, predictor = update.is_sharded, self._predictor
        watched = [] if predictor is None else [s for call in update.calls for s in call.signals]
        gradients = list(map(local, gradients)) if is_partial else gradients
        self._norms = _Norms.of(update.parts(), gradients, watched)
        r = nan
        if predictor is not None:
            step_norm, r = self._predict(predictor, options, update, gather)
            if r < inf:
                radius = 1.0 / r if r else inf
                return Measurement(Finding.MEASURED, radius, r * pi, -1, step_norm), _PREDICTED
        return self.measure_now(update, is_quick=r == inf)

    def measure_now(self, update: Update, *, is_quick: bool = False) -> tuple[Measurement, Reading]:
        """Return what is measured of the update that `measure` was last given, and how.

        Args:
            update: The update.
            is_quick: Whether a secant will do.

        Returns:
            The measurement, and the reading that it comes from. An obstacle is in its reason.
        """
        assert self._norms is not None
        is_partial = update.is_sharded
        reading, obstacle = self._read(update, is_quick)
        # The one host synchronization of a measurement.
        step_norm, gradient_norm, (radius, spread, index) = self._norms.read(reading.row.unbind())
        finding = _finding(radius, step_norm, gradient_norm, obstacle)
        reason = self._reason(finding, obstacle, update)
        if finding is not Finding.MEASURED:
            return Measurement(finding, radius, spread, -1, step_norm, reason, is_partial), reading
        found = Measurement(finding, radius, spread, int(index), step_norm, None, is_partial)
        return found, reading

    def suffices(self, measurement: Measurement, reading: Reading) -> bool:
        """Return whether a measurement, agreed over all workers, can decide about the step.

        Args:
            measurement: The measurement.
            reading: The reading that it comes from.

        Returns:
            False for a secant near the limit: r is then to be measured exactly.
        """
        if self._predictor is None or not _is_secant(reading):
            return True
        is_measured = measurement.finding is Finding.MEASURED
        return is_measured and self._predictor.is_far(_normalized_step(measurement))

    def learn(self, measurement: Measurement, reading: Reading) -> None:
        """Take what was measured, agreed over all workers, to predict from.

        Args:
            measurement: The measurement.
            reading: The reading that it comes from.
        """
        if self._predictor is not None and measurement.finding is Finding.MEASURED:
            r = _normalized_step(measurement)
            self._predictor.learn(measurement.step_norm, r, is_secant=_is_secant(reading))

    def _predict(
        self,
        predictor: Predictor,
        options: tuple[float, ...],
        update: Update,
        gather: Gather | None,
    ) -> tuple[float, float]:
        """Return the step distance and the predicted r: infinity for a secant, else NaN."""
        assert self._norms is not None
        step_norm, gradient_norm, signals = self._norms.read(self._norms.signals)
        sizes = [step_norm, gradient_norm, *map(abs, signals)]
        if gather is not None:
            sizes = _over_workers(sizes, gather, are_parts=update.is_sharded)
        step_norm, *signals = sizes
        r = predictor.predict(step_norm, signals, options)
        if r is None or not update.calls or (r == inf and not self._gauge.trusts_secants):
            r = nan
        if gather is not None:
            r = float(gather([r]).amax())  # NaN where any is
        return step_norm, r

    def _read(self, update: Update, is_quick: bool) -> tuple[Reading, str | None]:
        # Of a secant too: whether it suffices is a question that all workers answer alike.
        estimator = "secant" if is_quick else self._gauge.estimator
        nothing = Reading(torch.full((3,), nan, dtype=torch.float64), estimator)
        if not update.calls:
            return nothing, (
                "no gradient came back through a forward call of `model` since the last step; pass "
                "the module whose forward computes the logits, or tell the guard the whole step "
                "with guard.record(training_step, batch)"
            )
        try:
            reading = self._gauge.measure(update, self._controller.measure, is_quick=is_quick)
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


def _over_workers(sizes: Sequence[float], gather: Gather, *, are_parts: bool) -> list[float]:
    """Return the sizes that the batch of all workers has: two norms, and signals.

    That is what keeps the number of workers out of the decision: each one's own data would look
    unusual now and then, and with enough workers there would be such a one in every step.

    Args:
        sizes: Those of this worker.
        gather: Returns what every worker has.
        are_parts: Whether the norms are those of this worker's shard.

    Returns:
        The norms over all workers, and the largest of each signal.
    """
    slots = [0.0] * _SLOTS  # as many on every worker
    for index, signal in enumerate(sizes[2:]):
        # NaN is as unusual as infinity, and infinity stays the largest.
        slots[index % _SLOTS] = max(signal, slots[index % _SLOTS]) if signal == signal else inf
    rows = gather([*sizes[:2], *slots])
    norms = rows[:, :2].norm(dim=0) if are_parts else rows[:, :2].amax(0)
    return [*norms.tolist(), *rows[:, 2:].amax(0).tolist()]


_SLOTS = 3 * 8  # three signals each of eight outputs or micro-batches; those after share a slot


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


def _normalized_step(measurement: Measurement) -> float:
    return 1.0 / measurement.radius if measurement.radius else inf


def _is_secant(reading: Reading) -> bool:
    return reading.estimator.startswith("secant")


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
