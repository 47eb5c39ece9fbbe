"""The series behind figures and texts: one value of each quantity per step."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from safestep.runlog.reader import Run

HUGE = 1e100  # numbers up to it can be squared and summed
MAX_MICRO_BATCHES = 256  # a log is untrusted: no number in it may fill the memory
FEW = 0.05  # share of touched steps under which a mean over the run tells of one wild step alone


@dataclass(frozen=True, slots=True, eq=False)
class StepSeries:
    """One value per step, in the order of the run, NaN where the log has none. All shape ``[T]``.

    With several optimizers a step has several records. Their normalized steps add up (the spread
    is a seminorm), the joint radius follows, and the step counts as clipped if any of them was.

    Attributes:
        step: Step numbers.
        proposed: Normalized step r that the optimizer proposed.
        taken: Normalized step that was taken, proposed * scale; 0 where the step was skipped or
            rolled back.
        radius: Parameter distance at which r = 1.
        step_norm: Parameter distance that the optimizer proposed.
        scale: Factor applied to the step.
        learning_rate: Learning rate of the optimizer.
        effective_learning_rate: Learning rate that corresponds to the step taken.
        loss: Training loss before the step; the workers' mean if the step record has none.
        predicted_change: Change of the loss that linearised logits predicted of the proposed step;
            NaN where it was not measured, and with several optimizers.
        seconds: Cost of the guard at this step.
        clipped, skipped, unmeasured: Masks by status; a step rolled back counts as skipped.
    """

    step: np.ndarray
    proposed: np.ndarray
    taken: np.ndarray
    radius: np.ndarray
    step_norm: np.ndarray
    scale: np.ndarray
    learning_rate: np.ndarray
    effective_learning_rate: np.ndarray
    loss: np.ndarray
    predicted_change: np.ndarray
    seconds: np.ndarray
    clipped: np.ndarray
    skipped: np.ndarray
    unmeasured: np.ndarray

    @property
    def intervened(self) -> np.ndarray:
        """Whether the guard touched the step. Shape ``[T]``."""
        return self.clipped | self.skipped


@lru_cache(maxsize=16)  # every figure of a report uses it
def step_series(run: Run) -> StepSeries:
    """Return the step records as one value per step.

    Args:
        run: The run.

    Returns:
        The series; empty if the run has no steps.
    """
    steps, first, groups = np.unique(run.steps["step"], return_index=True, return_inverse=True)
    status = run.steps.get("status", np.full(len(groups), None, dtype=object))
    scale = _column(run, "scale")
    skipped_record = np.isin(status, ("skipped", "rolled back"))
    proposed_record = _column(run, "normalized_step")
    taken_record = np.where(skipped_record, 0.0, proposed_record * scale)
    proposed = np.bincount(groups, proposed_record, len(steps))
    is_joint = np.bincount(groups, minlength=len(steps)) > 1
    step_norm = _column(run, "step_norm")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        joint_norm = np.sqrt(np.bincount(groups, step_norm**2, len(steps)))
        step_norm = np.where(is_joint, joint_norm, step_norm[first])
        joint_radius = step_norm / proposed
    loss = _column(run, "loss")[first]
    with np.errstate(invalid="ignore"):  # inf - inf
        predicted_change = (_column(run, "divergence") + _column(run, "loss_slope"))[first]
    return StepSeries(
        step=steps,
        proposed=proposed,
        taken=np.bincount(groups, taken_record, len(steps)),
        radius=np.where(is_joint, joint_radius, _column(run, "radius")[first]),
        step_norm=step_norm,
        scale=_least(scale, groups, len(steps)),
        learning_rate=_column(run, "learning_rate")[first],
        effective_learning_rate=_column(run, "effective_learning_rate")[first],
        loss=np.where(np.isnan(loss), worker_mean(run, "loss", steps), loss),
        predicted_change=np.where(is_joint, np.nan, predicted_change),
        seconds=np.bincount(groups, _column(run, "seconds"), len(steps)),
        clipped=np.bincount(groups, status == "clipped", len(steps)) > 0,
        skipped=np.bincount(groups, skipped_record, len(steps)) > 0,
        unmeasured=np.bincount(groups, status == "unmeasured", len(steps)) > 0,
    )


def drawable(run: Run) -> Run:
    """Return the run with numbers that can be squared, summed and drawn.

    Args:
        run: The run.

    Returns:
        The run, with finite magnitudes over ``HUGE`` replaced by it and those under 1e-100 by 0.
    """

    def within(column: np.ndarray) -> np.ndarray:
        if column.dtype != np.float64:
            return column
        size = np.abs(column)
        is_huge = (size > HUGE) & (size < np.inf)
        column = np.where(is_huge, np.copysign(HUGE, column), column)
        return np.where(size < 1e-100, 0.0, column)

    steps, workers, micro = (
        columns.changed(within) for columns in (run.steps, run.workers, run.micro)
    )
    return replace(run, steps=steps, workers=workers, micro=micro)


def positive(values: np.ndarray) -> np.ndarray:
    """Return the values, NaN where they are not positive.

    Args:
        values: Any values. Shape ``[T]``.

    Returns:
        The positive ones. Shape ``[T]``.
    """
    return np.where(values > 0, values, np.nan)


def worker_noun(run: Run) -> str:
    """Return the word for the log's workers: "worker", or "micro-batch" in a single process.

    Args:
        run: The run.

    Returns:
        The word, in the singular.
    """
    is_micro = run.settings.get("workers") == "micro-batches" or run.header.get("world_size") == 1
    return "micro-batch" if is_micro else "worker"


def scalar(run: Run, name: str) -> np.ndarray:
    """Return a scalar column of the worker records, NaN where the log has none.

    Args:
        run: The run.
        name: The column.

    Returns:
        The values. Shape ``[T]``.
    """
    column = run.workers.get(name)
    if column is None or column.dtype == object or column.ndim != 1:
        return np.full(len(run.workers["step"]), np.nan)
    return column


def worker_mean(run: Run, name: str, steps: np.ndarray) -> np.ndarray:
    """Return the mean over the workers of a quantity at the given steps, NaN where there is none.

    Args:
        run: The run.
        name: A per-worker column, "loss" or "grad_norm".
        steps: Increasing step numbers. Shape ``[T]``.

    Returns:
        The means. Shape ``[T]``.
    """
    mean = np.full(len(steps), np.nan)
    values = run.workers.get(name)
    if values is None or values.ndim != 2 or not len(steps):
        return mean
    position = np.searchsorted(steps, run.workers["step"]).clip(max=len(steps) - 1)
    is_there = steps[position] == run.workers["step"]
    with np.errstate(invalid="ignore"):  # workers at inf and at -inf
        mean[position[is_there]] = values[is_there].mean(axis=1)
    return mean


def micro_means(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the workers of a quantity of each micro-batch of each step.

    Args:
        run: The run.
        name: "loss" or "grad_norm".

    Returns:
        Step numbers ``[T]`` and means ``[T, M]``, NaN where a worker has none; empty if the log
        has no micro-batches.
    """
    values, place = run.micro.get(name), run.micro.get("micro")
    if values is None or values.ndim != 2 or place is None or not len(place):
        return np.empty(0), np.empty((0, 0))
    steps, row = np.unique(run.micro["step"], return_inverse=True)
    is_known = (place >= 0) & (place < MAX_MICRO_BATCHES)
    means = np.full((len(steps), int(place[is_known].max(initial=-1)) + 1), np.nan)
    with np.errstate(invalid="ignore"):  # workers at inf and at -inf
        means[row[is_known], place[is_known].astype(int)] = values[is_known].mean(axis=1)
    return steps, means


def removed_area(series: StepSeries) -> float:
    """Return the share of the learning-rate area that the guard removed, NaN if unknown.

    Args:
        series: The steps.

    Returns:
        1 - sum of effective learning rates / sum of learning rates.
    """
    known = np.isfinite(series.learning_rate) & np.isfinite(series.effective_learning_rate)
    total = series.learning_rate[known].sum()
    if not total > 0:
        return float("nan")
    return float(1 - series.effective_learning_rate[known].sum() / total)


def step_share(run: Run) -> float:
    """Return the guard's share of the time of a training step, NaN if the log holds no times.

    Args:
        run: The run.

    Returns:
        guard / (guard + rest), in mean seconds per step; the rest is all time outside the guard. A
        rest over ten times the median (a validation pass) counts as ten times the median.
    """
    steps, first = np.unique(run.steps["step"], return_index=True)
    time, seconds = _column(run, "time")[first], step_series(run).seconds
    rest = (np.diff(time) - seconds[1:])[np.diff(steps) == 1]
    rest, known = rest[np.isfinite(rest)], seconds[np.isfinite(seconds)]
    if len(rest) < 3:
        return float("nan")
    rest = np.clip(rest, 0, 10 * np.median(rest.clip(min=0))).mean()
    return float(known.mean() / (known.mean() + rest)) if known.mean() + rest > 0 else float("nan")


def loss_ratios(series: StepSeries) -> tuple[np.ndarray, np.ndarray]:
    """Return the r of steps taken, and the ratio of the loss after to the loss before each.

    Args:
        series: The steps.

    Returns:
        r, to about three digits, and ratio of the steps that have both and whose next step is
        logged. Shape ``[K]`` each.
    """
    r, loss = series.taken[:-1], np.where(series.loss > 0, series.loss, np.nan)
    ratio = loss[1:] / loss[:-1]
    is_known = np.isfinite(ratio) & (r > 0) & np.isfinite(r) & (np.diff(series.step) == 1)
    # Steps that were scaled to the limit have the same r, but for rounding.
    return 10 ** np.round(np.log10(r[is_known]), 3), ratio[is_known]


def change_pairs(series: StepSeries) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted and the observed change of the loss, of steps that were left alone.

    Args:
        series: The steps.

    Returns:
        Predicted change, and the next loss minus this one. Shape ``[K]`` each.
    """
    predicted = series.predicted_change[:-1]
    with np.errstate(invalid="ignore", over="ignore"):  # both losses infinite
        observed = np.diff(series.loss)
    is_known = np.isfinite(predicted) & np.isfinite(observed) & (series.scale[:-1] == 1)
    is_known &= np.diff(series.step) == 1
    return predicted[is_known], observed[is_known]


def thin(*values: np.ndarray, keep: np.ndarray | None = None, max_points: int = 1500) -> np.ndarray:
    """Return indices that keep all extremes of the values, and every point in `keep`.

    Cuts the series into equal stretches and keeps, for every quantity, the points with the smallest
    and the largest value of each stretch.

    Args:
        *values: Quantities over one axis. Shape ``[T]`` each.
        keep: True for points to keep whatever their value. Shape ``[T]``.
        max_points: Approximate number of points kept for a quantity.

    Returns:
        Increasing indices, including the first and the last.

    Example:
        >>> spike = np.zeros(100_000)
        >>> spike[77_777] = 1.0
        >>> indices = thin(spike, max_points=100)
        >>> len(indices) < 150, 77_777 in indices
        (True, True)
    """
    length = len(values[0])
    if length <= max_points:
        return np.arange(length)
    width = -(-length // (max_points // 2))
    starts = np.arange(0, length, width)
    chosen = [starts[:1], np.array([length - 1])]
    for value in values:
        padded = np.full(len(starts) * width, np.nan)
        padded[:length] = value
        stretches = padded.reshape(-1, width)
        for worst, argument in ((np.inf, np.argmin), (-np.inf, np.argmax)):
            chosen.append(
                starts + argument(np.where(np.isnan(stretches), worst, stretches), axis=1)
            )
    if keep is not None:
        chosen.append(np.flatnonzero(keep))
    indices = np.unique(np.concatenate(chosen))
    return indices[indices < length]


def spans(mask: np.ndarray, max_gap: int = 1) -> list[tuple[int, int]]:
    """Return the first and last index of each run of true values.

    Args:
        mask: Truth values. Shape ``[T]``.
        max_gap: Runs whose neighbouring indices differ by no more than this are joined.

    Returns:
        Pairs of indices, both inclusive.

    Example:
        >>> spans(np.array([True, True, False, True]))
        [(0, 1), (3, 3)]
    """
    hits = np.flatnonzero(mask)
    if not len(hits):
        return []
    breaks = np.flatnonzero(np.diff(hits) > max_gap)
    firsts = hits[np.concatenate([[0], breaks + 1])]
    lasts = hits[np.concatenate([breaks, [len(hits) - 1]])]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _column(run: Run, name: str) -> np.ndarray:
    column = run.steps.get(name)
    if column is None or column.dtype == object or column.ndim != 1:
        return np.full(len(run.steps["step"]), np.nan)
    return column


def _least(values: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    least = np.full(num_groups, np.inf)
    with np.errstate(invalid="ignore"):
        np.minimum.at(least, groups, values)
    return least
