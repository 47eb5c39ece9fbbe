"""Measure an update with an estimator that works for the model, and check it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Literal

import torch
from torch import Tensor, nn

from safestep.capture import LogitFinder, LogitsFn, LogitsNotFoundError
from safestep.capture.call import Call
from safestep.measure.estimators import (
    LogitTangent,
    MissingTangentError,
    difference,
    difference_scale,
    is_repeatable,
    jvp,
    secant,
    working_dtype,
)
from safestep.measure.inner_radii import InnerWatch
from safestep.measure.perturb import moved_back
from safestep.parallel.shards import counted_here, refuse_flattened
from safestep.radius.masking import absent_classes

EstimatorName = Literal["jvp", "difference", "secant"]
Reduce = Callable[[Iterable[LogitTangent]], Tensor]

CHECKED_STEPS = 3  # in a row, before one estimator is believed
TOLERANCE = 0.2  # of r; the secant alone is off by 5 % at ordinary steps
_ROUNDING = 1.0  # units in the last place of the largest logit, by which a difference may be off


@dataclass(slots=True)  # not frozen: that alone takes longer to make, and one is made at every step
class Update:
    """What an estimator is given.

    Attributes:
        calls: The calls that the update was computed from.
        params: The trained parameters, after the update.
        start: Their values before it.
        change: The update of each of them.
        is_made: False where the update is still to come: `params` are at the start.
        is_sharded: Whether this rank holds but a shard of any parameter.
    """

    calls: Sequence[Call]
    params: Sequence[Tensor]
    start: Sequence[Tensor]
    change: Sequence[Tensor]
    is_made: bool = True
    is_sharded: bool = False

    def parts(self) -> list[Tensor]:
        """Return tensors whose joint 2-norm is that of the update; of this rank's part of it."""
        return list(compress(self.change, counted_here(self.params)))

    def at_start(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters are where the update begins."""
        return moved_back(self.params, self.start) if self.is_made else nullcontext()


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured, and how.

    Attributes:
        row: The result of `reduce`: ``[radius, largest spread, index]``.
        estimator: How, for the report: the estimator's name, with the r that it and a second one
            found where they differ.
        warning: What the user should know, said once; else None.
    """

    row: Tensor
    estimator: str
    warning: str | None = None


class Gauge:
    """Measure updates of one model.

    Where forward-mode automatic differentiation fails, the finite difference takes over for good.
    The first steps are measured twice, by independent estimators; while the two differ, every step
    is, and the larger r counts.

    Args:
        module: The root module of the calls.
        estimator: The estimator to begin with.
        logits: The user's way from an output to its logits.
        inside: Looks inside the model wherever the estimator is "jvp".

    Attributes:
        estimator: The estimator in use.
        finder: Says which logits were found, and what is doubtful about them.
    """

    def __init__(
        self,
        module: nn.Module,
        estimator: EstimatorName = "jvp",
        logits: LogitsFn | None = None,
        inside: InnerWatch | None = None,
    ) -> None:
        self.estimator: EstimatorName = estimator
        self._module = module
        self._jvp = partial(jvp, inside=inside)
        self.finder = LogitFinder(logits)
        self._agreements = 0
        self._has_disagreed = False

    @property
    def trusts_secants(self) -> bool:
        """Return whether a secant saves time, and is known to measure the same as the estimator."""
        return self.estimator == "jvp" and not self._has_disagreed

    def measure(self, update: Update, reduce: Reduce, *, is_quick: bool = False) -> Reading:
        """Return the reading of one update.

        Args:
            update: The update, just made.
            reduce: What turns rows of logits and tangents into ``[radius, largest spread, index]``.
            is_quick: Whether a secant will do, which nothing checks.

        Returns:
            The reading.

        Raises:
            RuntimeError: If no estimator works, or no tangent reaches the logits.
        """
        if is_quick:
            reading = Reading(self._row("secant", update, reduce), "secant")
        else:
            reading = self._reading(update, reduce)
        lacks = {what: None for call in update.calls for what in call.lacks}
        if not lacks:
            return reading
        return replace(
            reading, estimator=f"{reading.estimator} (of another random draw)",
            warning=reading.warning or (
                f"a call drew from {' and '.join(lacks)}, which it never did before and was not "
                "recorded: r is that of another draw. It is recorded from now on"
            ),
        )  # fmt: skip

    def _reading(self, update: Update, reduce: Reduce) -> Reading:
        refuse_flattened(update.params)
        if update.is_sharded:
            # Every forward pass gathers: ranks that ran different ones would wait for each other.
            return Reading(self._row(self.estimator, update, reduce), self.estimator)
        warning = None
        try:
            row = self._row(self.estimator, update, reduce)
        except RuntimeError as error:
            if self.estimator != "jvp" or isinstance(
                error, (MissingTangentError, LogitsNotFoundError)
            ):
                raise
            row = self._fall_back(error, update, reduce)
            warning = (
                f"{culprit(error, self._module)} has no forward-mode derivative "
                f"({_first_sentence(error)}); r is measured by finite difference from now on"
            )
        if self._agreements >= CHECKED_STEPS:
            return Reading(row, self.estimator, warning)
        reading = self._check(row, update, reduce)
        return Reading(reading.row, reading.estimator, warning or reading.warning)

    def _row(self, estimator: EstimatorName, update: Update, reduce: Reduce) -> Tensor:
        calls, params, start = update.calls, update.params, update.start
        rows: Generator[LogitTangent, None, None]
        if estimator == "secant" and update.is_made:
            with closing(secant(calls, self._module, params, start, self.finder)) as rows:
                return reduce(rows)
        ahead = partial(difference, scale=1.0)  # the secant, before the update is made
        estimate = {"jvp": self._jvp, "difference": difference, "secant": ahead}[estimator]
        with (
            update.at_start(),
            closing(estimate(calls, self._module, params, update.change, self.finder)) as rows,
        ):
            return reduce(rows)

    def _fall_back(self, error: RuntimeError, update: Update, reduce: Reduce) -> Tensor:
        try:
            row = self._row("difference", update, reduce)
        except Exception:
            raise error from None
        self.estimator = "difference"
        return row

    def _check(self, row: Tensor, update: Update, reduce: Reduce) -> Reading:
        unchecked = Reading(row, self.estimator)
        other: EstimatorName = "secant" if self.estimator == "difference" else "difference"
        sizes: list[Tensor] = []
        try:
            second = self._row(other, update, lambda rows: reduce(_noting_sizes(rows, sizes)))
        except Exception as error:  # the step is measured; what could not be is the check
            self._agreements = CHECKED_STEPS  # it would fail again at every step
            return Reading(
                row, self.estimator,
                f"r by {self.estimator} could not be checked by {other} ({_first_sentence(error)})",
            )  # fmt: skip
        r, r_second = (float(found[1]) / math.pi for found in (row, second))
        is_beyond_secant = "secant" in (self.estimator, other) and min(r, r_second) > 1
        if is_beyond_secant or not math.isfinite(r + r_second):
            return unchecked
        noise = self._noise(update, sizes, other)
        if abs(r - r_second) <= TOLERANCE * max(r, r_second) + noise:
            self._agreements += 1
            return unchecked
        return self._disagreement(row, second, update, f"r {r:.3g}; {other} r {r_second:.3g}")

    def _noise(self, update: Update, sizes: Sequence[Tensor], other: EstimatorName) -> float:
        """Return how far rounding alone may put the r of a difference off."""
        eps = torch.finfo(working_dtype(update.calls, update.params, self.finder)).eps
        size = float(torch.stack(list(sizes)).max()) if sizes else 0.0
        scale = difference_scale(update.calls, update.start, update.change, self.finder)
        if "secant" in (self.estimator, other):
            scale = min(1.0, scale)
        return _ROUNDING * eps * size / (scale * math.pi)

    def _disagreement(self, row: Tensor, second: Tensor, update: Update, text: str) -> Reading:
        self._agreements = 0
        if not is_repeatable(update.calls, self._module, self.finder):
            why = (
                "a call that is repeated gives other logits: it draws from a random generator that "
                "is out of reach, and r is that of another draw"
            )
        else:
            why = "the larger r counts"
            row = torch.where(second[1] > row[1], second, row)
        warning = None
        if not self._has_disagreed:
            warning = f"two estimators of one step differ: {self.estimator} {text}; {why}"
        self._has_disagreed = True
        return Reading(row, f"{self.estimator} ({text})", warning)


def culprit(error: BaseException, module: nn.Module) -> str:
    """Return the name and type of the innermost submodule that an error passed through.

    Args:
        error: An error that was raised while `module` ran.
        module: The root module.

    Returns:
        For instance ``"encoder.0.attention (Attention)"``; ``"the model"`` if none is known.
    """
    names = {id(child): name for name, child in module.named_modules()}
    found = "the model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        child = frame.f_locals.get("self")
        if id(child) in names:
            found = f"{names[id(child)] or 'the model'} ({type(child).__name__})"
    return found


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:160]


def _noting_sizes(rows: Iterable[LogitTangent], sizes: list[Tensor]) -> Iterator[LogitTangent]:
    for row in rows:
        logits = row.logits
        absent = absent_classes(logits)  # a mask of -1e9 is no number that anything is rounded by
        finite = (logits if absent is None else logits.masked_fill(absent, 0.0)).nan_to_num(
            neginf=0.0, posinf=0.0
        )
        sizes.append(finite.abs().amax().double())
        yield row
