"""The ladder of radii, row by row: how much each rung of proof gives back."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from safestep.plots.log_axis import make_log
from safestep.plots.style import INK, LADDER_COLORS, make_axes

__all__ = ["plot_ladder"]


def plot_ladder(radii: Mapping[str, Sequence[float] | np.ndarray], ax: Axes | None = None) -> Axes:
    """Draw the radii of a few rows, from the sure and small to the true and large.

    Args:
        radii: By rung, from the lowest, one radius a row; the names of ``LADDER_COLORS`` have
            their own colours. Shape ``[B]`` each, in any one unit.
        ax: Axes to draw on; a new pyplot figure without.

    Returns:
        The axes, with rows sorted by the last rung.

    Raises:
        ValueError: If there is no rung, or their lengths differ.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_ladder({"bound": [1.0, 2.0], "exact": [1.5, 4.0]}, Figure().add_subplot())
        >>> ax.get_xlabel()
        'radius / bound'
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in radii.items()}
    if not columns or len({column.shape for column in columns.values()}) != 1:
        shapes = {name: column.shape for name, column in columns.items()}
        raise ValueError(
            f"plot_ladder: expected `radii` with one radius a row for each rung, got {shapes}. "
            "Compute every rung for the same rows."
        )
    lowest, highest = next(iter(columns)), list(columns)[-1]
    order = np.argsort(columns[highest] / columns[lowest])
    ax = make_axes(ax, "The ladder of radii", "row", f"radius / {lowest}")
    rows = np.arange(len(order))
    relative = {name: (column / columns[lowest])[order] for name, column in columns.items()}
    ax.hlines(rows, 1, relative[highest], color=INK, alpha=0.25, linewidth=1)
    for name, values in relative.items():
        # The last rung is a ring: often another one reaches it.
        color, is_ring = LADDER_COLORS.get(name, INK), name == highest
        ax.plot(
            values, rows, "o", color=color, markersize=7 if is_ring else 4,
            fillstyle="none" if is_ring else "full", label=name,
        )  # fmt: skip
    make_log(ax, "x")
    ax.legend(loc="lower right", frameon=False, labelcolor="linecolor", handletextpad=0.1)
    return ax
