"""The estimators: an entry each, which all else that names them is derived from."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Literal

from torch import nn

from safestep.capture import LogitFinder
from safestep.measure.estimators import difference, jvp, secant
from safestep.measure.inner_radii import InnerWatch
from safestep.measure.perturb import displaced_by, moved_back
from safestep.parallel.shards import local_parts
from safestep.radius.batch import LogitTangent

if TYPE_CHECKING:
    from safestep.measure.update import Update

Rows = Generator[LogitTangent, None, None]
Run = Callable[["Update", nn.Module, LogitFinder, InnerWatch | None, float], Rows]


def _jvp(
    update: Update, module: nn.Module, finder: LogitFinder, inside: InnerWatch | None, reach: float
) -> Rows:
    with update.at_start():
        yield from jvp(update.calls, module, update.params, update.change, finder, inside)


def _difference(
    update: Update, module: nn.Module, finder: LogitFinder, inside: InnerWatch | None, reach: float
) -> Rows:
    with update.at_start():
        yield from difference(update.calls, module, update.params, update.change, finder, reach)


def _secant(
    update: Update, module: nn.Module, finder: LogitFinder, inside: InnerWatch | None, reach: float
) -> Rows:
    params, is_made = update.params, update.is_made
    start = update.start if is_made else displaced_by(local_parts(params), update.change)
    # Before the update is made, what was displaced is its end; exchanged, it is the start.
    with nullcontext() if is_made else moved_back(params, start):
        yield from secant(update.calls, module, params, start, finder, 1 / reach)


class Estimator(str, Enum):
    """How the radius of an update was found; the value is the name in a log.

    The entries stand in the order of trust, the most trusted first.

    Attributes:
        way: Its name on a report's page.
        meaning: What it does, and when it is used, for a reader of the page.
        run: Yields the logits of an update and their tangents, given the update, the module, the
            finder of logits, what looks inside the model and how many times less far than usual a
            difference of logits goes. None if nothing is run.
        is_option: Whether a user may choose it.
        error: Share of r by which it may be off.
        error_half: The same, in half precision.
    """

    JVP = (
        "jvp", "exact",
        "the derivative of the logits along the step, by forward-mode differentiation",
        _jvp, True, 0.02, 0.1,
    )  # fmt: skip
    DIFFERENCE = (
        "difference", "difference",
        "a finite difference of the logits along a small part of the step, off by 2 % of r at "
        "most (20 % in half precision), or by the error given beside it",
        _difference, True, 0.02, 0.2,
    )  # fmt: skip
    SAMPLED = (
        "sampled", "sampled",
        "exact for some examples of a batch, scaled to all; where r is far under the limit",
        _jvp,
    )  # fmt: skip
    SECANT = (
        "secant", "secant",
        "the change of the logits over a quarter of the step, or all of it in half precision; "
        "used where r is well under the limit",
        _secant, True, 0.2, 0.2,
    )  # fmt: skip
    PREDICTED = (
        "predicted", "predicted",
        "not measured: an upper estimate of r from the steps before; used where it is far under "
        "the limit",
    )  # fmt: skip

    way: str
    meaning: str
    run: Run | None
    is_option: bool
    error: float
    error_half: float

    def __new__(
        cls,
        name: str,
        way: str,
        meaning: str,
        run: Run | None = None,
        is_option: bool = False,
        error: float = 0.0,
        error_half: float = 0.0,
    ) -> Estimator:
        """Return the member that an entry describes."""
        self = str.__new__(cls, name)
        self._value_ = name
        self.way, self.meaning = way, meaning
        self.run, self.is_option = run, is_option
        self.error, self.error_half = error, error_half
        return self


ESTIMATOR_OPTIONS = ("auto", *(each.value for each in Estimator if each.is_option))
# For type checkers, which cannot read it from the entries: a test compares the two.
EstimatorOption = Literal["auto", "jvp", "difference", "secant"]
