"""Whether the loss changed as linearised logits predicted."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from safestep.plots.figure_registry import figure
from safestep.plots.loss import rank_correlation, say_correlation
from safestep.plots.style import INK, dots, make_axes, note, say
from safestep.plots.wording import number
from safestep.runlog.reader import Run
from safestep.runlog.series import change_pairs, step_series

__all__ = ["plot_loss_change"]

_FEW = 10  # steps; fewer say nothing about a noisy loss
_GROUPS = 8


def _has_pairs(run: Run) -> bool:
    return len(change_pairs(step_series(run))[0]) >= _FEW


def _says(run: Run) -> str:
    predicted, observed = change_pairs(step_series(run))
    told = f"predicted {number(predicted.mean())}, observed {number(observed.mean())} nats"
    rho = rank_correlation(predicted, observed)
    agreement = "" if np.isnan(rho) else f"; {say_correlation(rho)}"
    return f"Mean change of the loss over {len(predicted):,} measured steps: {told}{agreement}."


@figure(
    "loss_change",
    caption="Each dot is a measured step that was left alone: what linearised logits predicted for "
    "its own batch, and what the loss of the next batch showed. Thick line: medians of equal "
    "shares. Thin line: equality.",
    says=_says, has_data=_has_pairs,
)  # fmt: skip
def plot_loss_change(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the loss change that was observed over the one that was predicted.

    Args:
        run: The run.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.
    """
    ax = make_axes(
        ax, "Predicted loss change", "next loss - loss (nats)", "predicted change (nats)"
    )
    predicted, observed = change_pairs(step_series(run))
    if len(predicted) < 2:
        return say(ax, "no measured step with two losses")
    dots(ax, predicted, observed, "normalized_step", size=3 if len(predicted) > 100 else 6)
    shares = np.array_split(np.argsort(predicted), min(_GROUPS, len(predicted)))
    middle = [(np.median(predicted[share]), np.median(observed[share])) for share in shares]
    ax.plot(*zip(*middle, strict=True), color=INK, linewidth=1.6, marker="o", markersize=3)
    ax.axline((0, 0), slope=1, color=INK, linewidth=0.8, alpha=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    rho = rank_correlation(predicted, observed)
    if np.isfinite(rho):
        note(ax, say_correlation(rho), INK)
    return ax
