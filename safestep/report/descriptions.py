"""Each figure's facts in words, for those who cannot see it."""

import numpy as np

from safestep.plots.steps import PHASES, rank_correlation
from safestep.plots.wording import count, number, sentence
from safestep.report.regimes import TOLERANCE
from safestep.runlog.inner_series import binding_shares, least_radii
from safestep.runlog.reader import Run
from safestep.runlog.series import loss_ratios, removed_area, scalar, step_series


def describe_loss(run: Run) -> str:
    """Return the facts of the figure of the loss."""
    series = step_series(run)
    touched = count(int(series.intervened.sum()), "step")
    return f"Training loss: {_course(series.step, series.loss)}. The guard touched {touched}."


def describe_safe_zone(run: Run) -> str:
    """Return the facts of the figure of step distance and radius."""
    series = step_series(run)
    longer = count(int((series.step_norm > series.radius).sum()), "step")
    return (
        f"Radius: {_course(series.step, series.radius)}. Proposed step distance: "
        f"{_course(series.step, series.step_norm)}; longer than the radius at {longer}."
    )


def describe_normalized_step(run: Run) -> str:
    """Return the facts of the figure of r."""
    series = step_series(run)
    over = count(int((series.proposed > 1).sum()), "step")
    return f"Normalized step r: {_course(series.step, series.proposed)}; over 1 at {over}."


def describe_learning_rate(run: Run) -> str:
    """Return the facts of the figure of the learning rates."""
    series = step_series(run)
    return (
        f"Base learning rate: {_course(series.step, series.learning_rate)}. Effective: "
        f"{_course(series.step, series.effective_learning_rate)}. The guard removed "
        f"{removed_area(series):.1%} of the area under the base."
    )


def describe_distribution(run: Run) -> str:
    """Return the facts of the figure of r by phase."""
    series = step_series(run)
    facts = []
    for name, phase in zip(PHASES, np.array_split(np.arange(len(series.step)), 3), strict=True):
        r = series.proposed[phase]
        if np.isfinite(r).any():
            rate = series.clipped[phase].mean()
            facts.append(f"{name} {number(float(np.nanmedian(r)))} ({rate:.1%} clipped)")
    return f"Median r by phase of the run: {', '.join(facts)}."


def describe_prediction(run: Run) -> str:
    """Return the facts of the figure of r against the loss that followed."""
    r, ratio = loss_ratios(step_series(run))
    facts = [f"rank correlation of r with the loss ratio {rank_correlation(r, ratio):+.2f}"]
    for name, part in (("up to 1", r <= 1 + TOLERANCE), ("over 1", r > 1 + TOLERANCE)):
        if part.any():
            median = number(float(np.median(ratio[part])))
            facts.append(f"loss after / before a step with r {name}: median {median}")
    return sentence("; ".join(facts))


def describe_binding_radius(run: Run) -> str:
    """Return the facts of the figure of the radii inside the model."""
    steps, radii = least_radii(run)
    courses = [f"Radius, {kind}: {_course(steps, values)}." for kind, values in radii.items()]
    shares = [f"{kind} at {share:.0%}" for kind, share in binding_shares(radii).items()]
    return " ".join([*courses, f"The smallest is {', '.join(shares)} of the steps."])


def describe_cost(run: Run) -> str:
    """Return the facts of the figure of the guard's cost."""
    series = step_series(run)
    return f"Time of the guard in milliseconds: {_course(series.step, 1e3 * series.seconds)}."


def describe_heatmap(run: Run, quantity: str) -> str:
    """Return the facts of a figure of one quantity by worker.

    Args:
        run: The run.
        quantity: The column of the workers' records.

    Returns:
        The facts.
    """
    values = run.workers[quantity][-max(1, len(run.workers[quantity]) // 10) :]
    shown = range(min(values.shape[1], 8))
    medians = [
        f"worker {rank} {number(float(np.nanmedian(values[:, rank])))}"
        for rank in shown if np.isfinite(values[:, rank]).any()
    ]  # fmt: skip
    more = f" and {values.shape[1] - 8} more workers" if values.shape[1] > 8 else ""
    flagged = count(int(np.isfinite(scalar(run, "outlier")).sum()), "step")
    return (
        f"Median over the last tenth: {', '.join(medians)}{more}. "
        f"One worker stood out at {flagged}."
    )


def describe_dispersion(run: Run) -> str:
    """Return the facts of the figure of the workers' dispersion."""
    return (
        "Coefficient of variation of the gradient norms over the workers: "
        f"{_course(run.workers['step'], scalar(run, 'grad_norm_cv'))}. Standard deviation of the "
        f"losses: {_course(run.workers['step'], scalar(run, 'loss_std'))}."
    )


def describe_consistency(run: Run) -> str:
    """Return the facts of the figure of the workers' cosines."""
    cosine = _course(run.workers["step"], scalar(run, "pairwise_cosine"))
    return f"Mean cosine between two workers' gradients: {cosine}."


def describe_noise_scale(run: Run) -> str:
    """Return the facts of the figure of the gradient noise scale."""
    scale = scalar(run, "noise_scale")
    infinite = count(int(np.isinf(scale).sum()), "step")
    course = _course(run.workers["step"], scale)
    return f"Gradient noise scale in examples: {course}; infinite at {infinite}."


def _course(steps: np.ndarray, values: np.ndarray) -> str:
    """Return where finite values begin and end, their extremes and where these are."""
    at = np.flatnonzero(np.isfinite(values))
    if not len(at):
        return "unknown"
    ends = {
        "": at[0],
        "at the end ": at[-1],
        "lowest ": at[values[at].argmin()],
        "highest ": at[values[at].argmax()],
    }
    facts = [f"{name}{number(float(values[i]))} at step {steps[i]}" for name, i in ends.items()]
    return ", ".join([*facts, f"median {number(float(np.median(values[at])))}"])
