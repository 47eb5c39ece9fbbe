"""Detect a deviating worker from the workers' logged numbers, over ranks and time.

Workers that draw from the same data are exchangeable: at each step their order by loss or gradient
norm is a random permutation, whatever the distribution and however training drifts. A test of the
order therefore needs no model of the noise, and its false-alarm rate is bounded.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

QUANTITIES = ("loss", "gradient norm", "cosine to the mean")
_NORM = 1
# A gradient norm that exceeds the others by both this many MADs and this factor is an event at
# once; the order needs many steps. Mini-batches stay far below both limits (heavy tails: factor 30
# was seen on a fitted classifier).
_SPIKE_MADS = 20.0
_SPIKE_FACTOR = 100.0
# Largest deviation that counts, for workers whose values are all equal and give no scale.
_FAR_MADS = 1000.0
# Number of steps that are kept to date an event. The first of them count as ordinary if their mean
# deviation is at most this share of the mean of those after them.
_KEPT, _ORDINARY = 128, 0.2
# The scale of ordinary deviations is averaged over about this many steps.
_MEMORY = 50


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """One worker departs from the others.

    Attributes:
        step: Step at which the evidence sufficed.
        rank: The worker. With two workers, the one with the larger value; if several replicas
            differ, the first.
        quantity: One of `QUANTITIES`, or what differs between replicas.
        deviation: Mean signed distance from the workers' median since ``since``, in MADs (median
            absolute deviations of the workers); NaN for a non-finite worker. For update norms,
            their relative difference; for checksums, NaN.
        since: Estimated onset: the step at which the deviation began.
        message: The event in a sentence.
    """

    step: int
    rank: int
    quantity: str
    deviation: float
    since: int
    message: str


class WorkerWatch:
    """Distinguish a deviating worker from the usual spread among workers.

    For each quantity and side, place k of N (0 = most extreme) has the likelihood ratio
    N 2^-k / (2 - 2^(1-N)) of "often among the extremes" against "all orders equally likely". Its
    logarithms are summed from the step that makes the sum largest (CUSUM); at log(6 N /
    false_alarms) the worker is named. By Ville's inequality, exchangeable workers cause on average
    at most ``false_alarms`` events per step. A worker that is always the extreme is named after 57,
    31, 23, 13 steps for N = 2, 3, 4, 8. A non-finite value, or a gradient norm a hundred times the
    others', is named at once.

    The others are not compared with a named worker until its evidence has faded, so one fault
    causes one event. Workers with different data are not exchangeable and are rightly named.

    Args:
        num_workers: Number of workers.
        false_alarms: Largest expected number of false events per step from the order of
            exchangeable workers.
        non_finite_patience: Number of consecutive steps for which a gradient may be non-finite
            while the loss is finite; with float16 loss scaling, overflows occur by design.

    Example:
        >>> watch = WorkerWatch(4)
        >>> for step in range(40):
        ...     for event in watch.update(step, [1.0, 1.1, 1.2, 3.0], [2.0] * 4, [0.9] * 4):
        ...         print(event.message)
        rank 3: loss 18.5 times the usual spread above the others since step 0
    """

    def __init__(
        self, num_workers: int, *, false_alarms: float = 1e-6, non_finite_patience: int = 0
    ) -> None:
        shape = (2, len(QUANTITIES), num_workers)  # sides: above, below
        self._threshold = math.log(math.prod(shape) / false_alarms)
        self._patience = non_finite_patience
        self._evidence = np.zeros(shape)
        self._since = np.zeros(shape, dtype=np.int64)
        self._count = np.zeros(shape, dtype=np.int64)
        self._deviation_sum = np.zeros(shape)
        self._scale = np.full(len(QUANTITIES), np.nan)
        self._named = np.zeros(num_workers, dtype=bool)
        self._non_finite = np.zeros(num_workers, dtype=np.int64)
        self._recent = np.full((_KEPT, len(QUANTITIES), num_workers), np.nan)
        self._recent_steps = np.zeros(_KEPT, dtype=np.int64)

    def update(
        self, step: int, losses: ArrayLike, grad_norms: ArrayLike, cosines_to_mean: ArrayLike
    ) -> list[WorkerEvent]:
        """Add one step's numbers and return the new events, usually none.

        Args:
            step: The step's number.
            losses: Each worker's loss. Shape ``[N]``.
            grad_norms: Each worker's gradient norm. Shape ``[N]``.
            cosines_to_mean: Each worker's cosine to the mean gradient. Shape ``[N]``.

        Returns:
            The events of this step.
        """
        with np.errstate(all="ignore"):  # zeros and non-finite numbers are ordinary input here
            values = np.stack(
                [np.asarray(v, np.float64) for v in (losses, grad_norms, cosines_to_mean)]
            )
            events = self._non_finite_events(step, np.isfinite(values))
            values[_NORM] = np.log(values[_NORM])  # norms are compared by ratio
            deviations = values - np.median(values, axis=1, keepdims=True)
            events += self._spike_events(step, deviations)
            self._gather_evidence(step, values, deviations)
            self._update_scale(deviations)
        return events + self._evidence_events(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the evidence so far, as lists of numbers."""
        return {name: getattr(self, name).tolist() for name in self._state_names()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the evidence that `state_dict` returned.

        Args:
            state: The state of a watch over the same number of workers.

        Raises:
            ValueError: If the number of workers differs.
        """
        if len(state["_named"]) != len(self._named):
            raise ValueError(
                f"WorkerWatch: expected `state` of {len(self._named)} workers, got "
                f"{len(state['_named'])}. Start afresh when the number of workers changes."
            )
        for name in state.keys() & set(self._state_names()):  # older states lack some
            setattr(self, name, np.array(state[name], dtype=getattr(self, name).dtype))

    def _state_names(self) -> list[str]:
        return [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]

    def _non_finite_events(self, step: int, is_finite: NDArray[np.bool_]) -> list[WorkerEvent]:
        bad_loss = ~is_finite[0]
        self._non_finite = np.where(is_finite[_NORM], 0, self._non_finite + 1)
        is_bad = bad_loss | (self._non_finite > self._patience)
        events = []
        for rank in np.flatnonzero(is_bad & ~self._named).tolist():
            quantity = 0 if bad_loss[rank] else _NORM
            since = step - max(0, int(self._non_finite[rank]) - 1) if quantity else step
            message = f"rank {rank}: {QUANTITIES[quantity]} not finite since step {since}"
            events.append(WorkerEvent(step, rank, QUANTITIES[quantity], math.nan, since, message))
            self._name(rank, 0, quantity)
        return events

    def _spike_events(self, step: int, deviations: Array) -> list[WorkerEvent]:
        # One gradient norm far beyond all others, such as a bit flip causes.
        if len(self._named) < 3 or not np.isfinite(self._scale[_NORM]):
            return []
        mads = deviations[_NORM] / self._scale[_NORM]
        is_spike = (mads > _SPIKE_MADS) & (deviations[_NORM] > math.log(_SPIKE_FACTOR))
        events = []
        for rank in np.flatnonzero(
            is_spike & np.isfinite(deviations[_NORM]) & ~self._named
        ).tolist():
            factor = np.exp(deviations[_NORM, rank])
            message = f"rank {rank}: gradient norm {factor:.3g} times the others' at step {step}"
            events.append(
                WorkerEvent(step, rank, QUANTITIES[_NORM], float(mads[rank]), step, message)
            )
            self._name(rank, 0, _NORM)
        return events

    def _gather_evidence(self, step: int, values: Array, deviations: Array) -> None:
        signed = np.stack([values, -values])
        evidence = np.maximum(self._evidence, 0) + _log_likelihood_ratio(signed, ~self._named)
        is_fresh = self._evidence <= 0
        self._since[is_fresh] = step
        self._count[is_fresh] = 0
        self._deviation_sum[is_fresh] = 0
        self._count += 1
        scale = np.where(np.isfinite(self._scale), self._scale, _mad(deviations))
        mads = np.nan_to_num(deviations / scale[:, None])
        mads = mads.clip(-_FAR_MADS, _FAR_MADS)
        self._deviation_sum += mads
        self._recent = np.concatenate([self._recent[1:], mads[None]])
        self._recent_steps = np.append(self._recent_steps[1:], step)
        # A named worker's evidence is capped at the threshold; at zero the worker is cleared.
        fading = np.where(self._evidence > 0, np.minimum(evidence, self._threshold), 0)
        self._evidence = np.maximum(np.where(self._named, fading, evidence), 0)
        self._named &= (self._evidence > 0).any((0, 1))

    def _evidence_events(self, step: int) -> list[WorkerEvent]:
        evidence = np.where(self._named, 0, self._evidence)
        if len(self._named) == 2:
            evidence[1] = 0  # both deviate equally: report only the upper one
        has_crossed = (evidence >= self._threshold).any((0, 1))
        if not has_crossed.any():
            return []
        # Report the quantity with the largest deviation, not the one that crossed first.
        shows = has_crossed & (evidence >= self._threshold / 2)
        deviations = self._deviation_sum / np.maximum(self._count, 1)
        order = np.where(shows, np.abs(deviations), -1)
        side, quantity, rank = (int(i) for i in np.unravel_index(order.argmax(), order.shape))
        since, deviation = self._dated(side, quantity, rank)
        is_known = abs(deviation) < 0.9 * _FAR_MADS
        amount = f"{abs(deviation):.1f} times the usual spread" if is_known else "far"
        message = (
            f"rank {rank}: {QUANTITIES[quantity]} {amount} "
            f"{('above', 'below')[side]} the others since step {since}"
        )
        if len(self._named) == 2:
            message += " (of two workers either may be the one that is off)"
        self._name(rank, side, quantity)
        return [WorkerEvent(step, rank, QUANTITIES[quantity], deviation, since, message)]

    def _dated(self, side: int, quantity: int, rank: int) -> tuple[int, float]:
        """Return when a deviation began, and its mean since then.

        Evidence often begins to grow by chance. So the first part is left out if its mean deviation
        is at most a fifth of the mean of the rest; the cut is where the mean changes most.
        """
        since, count = (int(of[side, quantity, rank]) for of in (self._since, self._count))
        if count > _KEPT:  # it began before the steps that are kept
            return since, float(self._deviation_sum[side, quantity, rank] / count)
        mads = self._recent[-count:, quantity, rank]
        sums, cuts = np.cumsum(mads), np.arange(1, count)
        before, after = sums[:-1] / cuts, (sums[-1] - sums[:-1]) / (count - cuts)
        change = np.sqrt(cuts * (count - cuts)) * np.abs(after - before)
        change = np.where(np.abs(before) <= _ORDINARY * np.abs(after), change, 0.0)
        cut = int(cuts[change.argmax()]) if change.any() else 0
        return int(self._recent_steps[-count:][cut]), float(mads[cut:].mean())

    def _name(self, rank: int, side: int, quantity: int) -> None:
        """Stop comparing with the worker; reset the others, whose evidence relied on its values."""
        self._named[rank] = True
        self._evidence[..., ~self._named] = 0
        self._evidence[..., rank] = 0
        self._evidence[side, quantity, rank] = self._threshold

    def _update_scale(self, deviations: Array) -> None:
        mad = _mad(deviations)
        is_first = ~np.isfinite(self._scale)
        mixed = self._scale + (mad - self._scale) / _MEMORY
        self._scale = np.where(is_first, mad, np.where(np.isfinite(mad), mixed, self._scale))


def _mad(deviations: Array) -> Array:
    """Return the workers' median absolute deviation of each quantity."""
    return np.median(np.abs(deviations), axis=1)


def _log_likelihood_ratio(values: Array, is_like: NDArray[np.bool_]) -> Array:
    """Return each worker's evidence from one step; ties share, non-finite quantities give none.

    Each worker is ranked against the others that are like it (not named), largest value first.
    """
    count = len(is_like)
    others = is_like & ~np.eye(count, dtype=bool)  # [worker, other]
    size = others.sum(1) + 1
    rivals = np.where(others, values[..., None, :], np.nan)
    above = (rivals > values[..., None]).sum(-1)
    not_below = (rivals >= values[..., None]).sum(-1)
    # The mean of 2^-k over the tied places k = above .. not_below.
    weight = (2.0 ** (1.0 - above) - 2.0**-not_below) / (not_below - above + 1)
    ratio = np.log(size * weight / (2 - 2.0 ** (1 - size)))
    usable = np.isfinite(np.where(is_like, values, 0)).all(-1, keepdims=True)
    return np.where(usable & np.isfinite(values), ratio, 0)
