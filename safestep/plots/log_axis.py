"""Logarithmic axes: when to use one, where its ticks are and how they are labelled."""

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, LogLocator, NullLocator

_ROOMY = 40  # a log axis that spans less has room for labels between the powers of ten
_TIGHT, _FINE = 5, (1, 1.5, 2, 3, 4, 5, 7)  # one that spans less than 5 needs more of them
_MOST_TICKS = 7  # along one axis; more overlap on a phone


def use_log_scale(ax: Axes, *values: np.ndarray, ratio: float = 30, max_depth: float = 0.0) -> None:
    """Make the y axis logarithmic where positive values span more than the ratio.

    Args:
        ax: The axes.
        *values: What is drawn on them.
        ratio: Largest over smallest from which on a linear axis would hide the small.
        max_depth: Lowest value shown, as a share of the lowest median.
    """
    known = [finite for value in values if len(finite := value[np.isfinite(value)])]
    shown = np.concatenate(known or [np.empty(0)])
    if not len(shown) or shown.min() <= 0 or shown.max() <= ratio * shown.min():
        return
    make_log(ax, "y")
    floor = max_depth * min(np.median(value) for value in known)
    if shown.min() < floor:  # the last steps of a schedule that ends at 0 say nothing
        ax.set_ylim(bottom=floor)


class PlainLogFormatter(Formatter):
    """Label the ticks of a log axis as plain numbers; powers of ten alone on a long axis.

    Twice as quick as matplotlib's own labels, which parse formulas.
    """

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of the tick at x, empty where it has none."""
        if x <= 0:
            return ""
        return f"{x:,g}" if 1e-3 <= x < 1e5 else f"{x:.0e}".replace("e+0", "e").replace("e-0", "e-")


class DecadeLocator(LogLocator):
    """Place ticks on powers of ten, and on 2 and 5 times them where the axis is short.

    matplotlib's own locator places none at all where both are asked for on a long axis.

    Args:
        most: Largest number of ticks.
    """

    def __init__(self, most: int) -> None:
        super().__init__(subs=(1.0,), numticks=most)

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        """Return where the ticks are between two values."""
        is_short = vmin > 0 and vmax < _ROOMY * vmin
        self.set_params(subs=_FINE if vmax < _TIGHT * vmin else (1, 2, 5) if is_short else (1,))
        return np.asarray(super().tick_values(vmin, vmax))


def make_log(ax: Axes, axis: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, its ticks labelled in plain numbers.

    Args:
        ax: The axes.
        axis: Which of its axes.
    """
    ax.set(**{f"{axis}scale": "log"})
    ticks = ax.xaxis if axis == "x" else ax.yaxis
    ticks.set_major_locator(DecadeLocator(_MOST_TICKS))
    ticks.set_major_formatter(PlainLogFormatter())
    ticks.set_minor_locator(NullLocator())
