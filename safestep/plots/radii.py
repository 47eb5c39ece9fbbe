"""Which radius binds over a run: the output's, attention's or the ReLU-like units'."""

import numpy as np
from matplotlib.axes import Axes

from safestep.plots.figure_registry import figure
from safestep.plots.log_axis import use_log_scale
from safestep.plots.style import COLORS, INK, label_ends, last_finite, make_axes, note, say
from safestep.plots.wording import percent
from safestep.runlog.inner_series import binding_shares, least_radii
from safestep.runlog.reader import Run
from safestep.runlog.series import thin

__all__ = ["plot_binding_radius"]

RADIUS_COLORS = {
    "output": COLORS["radius"],
    "attention": COLORS["normalized_step"],
    "ffn": COLORS["learning_rate"],
}


_NAMES = {"output": "the output's", "attention": "attention's", "ffn": "the ReLU-like units'"}


def _says(run: Run) -> str:
    shares = binding_shares(least_radii(run)[1])
    if not shares:
        return "No radius is finite at any step."
    facts = [f"{_NAMES[kind]} at {percent(share)}" for kind, share in shares.items()]
    return f"The smallest radius was {', '.join(facts)} of the steps."


@figure(
    "binding_radius",
    caption="The radius of the output's softmax, of attention's, and where ReLU-like units switch. "
    "The lowest binds, but the guard decides on the output's alone.",
    says=_says, has_data=lambda run: bool(least_radii(run)[1]),
)  # fmt: skip
def plot_binding_radius(run: Run, ax: Axes | None = None) -> Axes:
    """Draw the radius of the output beside those inside the model: the lowest line binds.

    Args:
        run: A run with ``SafeStep(..., radii=("output", "attention", "ffn"))``.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes.

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Sec. 6.6 and Table 2.
    """
    ax = make_axes(ax, "Which radius binds", "radius (parameter distance)")
    steps, radii = least_radii(run)
    shown = {
        kind: np.where(np.isfinite(values) & (values > 0), values, np.nan)
        for kind, values in radii.items()
    }
    shown = {kind: values for kind, values in shown.items() if not np.isnan(values).all()}
    if not shown:
        return say(ax, "the log holds no radii inside the model")
    for kind, values in shown.items():
        is_known = ~np.isnan(values)
        step, known = steps[is_known], values[is_known]
        at = thin(np.log(known))
        marker = "." if len(at) == 1 else ""
        ax.plot(step[at], known[at], marker=marker, color=RADIUS_COLORS[kind], linewidth=1.2)
    use_log_scale(ax, *shown.values())
    ends = [(last_finite(values), kind, RADIUS_COLORS[kind]) for kind, values in shown.items()]
    label_ends(ax, ends)
    shares = binding_shares(radii).items()
    note(ax, ", ".join(f"{kind} {percent(share)}" for kind, share in shares), INK)
    return ax
