"""The report's figures: each is one entry, made where its plot function is defined."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from safestep.runlog.reader import Run
from safestep.runlog.series import scalar, step_series

Plot = Callable[[Run, Axes], Axes]


@dataclass(frozen=True, slots=True)
class FigureKind:
    """One figure of the report.

    Attributes:
        name: Stem of its files.
        caption: How to read it.
        plot: Draws a run on axes.
        says: Returns, in one sentence, what the figure says about a run that has its data.
        has_data: Whether a run has what it shows.
        is_first: Whether it is shown at once; the others are folded under "more".
    """

    name: str
    caption: str
    plot: Plot
    says: Callable[[Run], str]
    has_data: Callable[[Run], bool]
    is_first: bool = False


FIGURES: list[FigureKind] = []  # in the order of the page


def figure(
    name: str,
    *,
    caption: str,
    says: Callable[[Run], str],
    has_data: Callable[[Run], bool],
    is_first: bool = False,
) -> Callable[[Plot], Plot]:
    """Return a decorator that adds a plot function to the report.

    The module of the function must be imported by ``safestep.plots``.

    Args:
        name: Stem of the figure's files.
        caption: How to read it.
        says: Returns, in one sentence, what the figure says about a run.
        has_data: Whether a run has what it shows.
        is_first: Whether it is shown at once, not folded under "more".

    Returns:
        The decorator; it returns the function as it is.
    """

    def add(plot: Plot) -> Plot:
        FIGURES.append(FigureKind(name, caption, plot, says, has_data, is_first))
        return plot

    return add


def has_step(field: str) -> Callable[[Run], bool]:
    """Return a test whether any step of a run has a finite value of a field of StepSeries."""
    return lambda run: bool(np.isfinite(getattr(step_series(run), field)).any())


def has_worker_scalar(name: str) -> Callable[[Run], bool]:
    """Return a test whether any workers' record has a finite scalar of this name."""
    return lambda run: bool(np.isfinite(scalar(run, name)).any())


def has_worker_columns(name: str) -> Callable[[Run], bool]:
    """Return a test whether a run has a finite value of this name for any single worker."""

    def has(run: Run) -> bool:
        values = run.workers.get(name)
        return values is not None and values.ndim == 2 and bool(np.isfinite(values).any())

    return has
