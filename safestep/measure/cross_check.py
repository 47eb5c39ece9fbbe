"""Measure an update with an estimator that works for the model, and check it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safestep.capture import LogitFinder, LogitsFn, LogitsNotFoundError
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
from safestep.measure.update import Estimator, Measurement, Update
from safestep.parallel.shards import refuse_flattened
from safestep.radius.batch import BatchRadius, BatchRule
from safestep.radius.masking import absent_classes

CHECKED_STEPS = 3  # in a row, before one estimator is believed
TOLERANCE = 0.2  # of r; the secant alone is off by 5 % at ordinary steps
_ROUNDING = 1.0  # units in the last place of the largest logit, by which a difference may be off


class CheckedEstimator:
    """Measure updates of one model, and check the measurement by a second estimator.

    Where forward-mode automatic differentiation fails, the finite difference takes over for good.
    The first steps are measured twice, by independent estimators; while the two differ, every step
    is, and the larger r counts.

    Args:
        module: The root module of the calls.
        rule: How the rows of a batch become one radius.
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
        rule: BatchRule,
        estimator: Estimator = Estimator.JVP,
        logits: LogitsFn | None = None,
        inside: InnerWatch | None = None,
    ) -> None:
        self.estimator = estimator
        self._module = module
        self._rule = rule
        self._jvp = partial(jvp, inside=inside)
        self.finder = LogitFinder(logits)
        self._agreements = 0
        self._has_disagreed = False

    @property
    def trusts_secants(self) -> bool:
        """Return whether a secant saves time, and is known to measure the same as the estimator."""
        return self.estimator is Estimator.JVP and not self._has_disagreed

    def measure(self, update: Update, *, is_quick: bool = False) -> Measurement:
        """Return what is measured of one update.

        Args:
            update: The update.
            is_quick: Whether a secant will do, which nothing checks.

        Returns:
            The measurement, without a step norm.

        Raises:
            RuntimeError: If no estimator works, or no tangent reaches the logits.
        """
        if is_quick:
            found = _measurement(Estimator.SECANT, self._smallest(Estimator.SECANT, update))
        else:
            found = self._checked(update)
        lacks = {what: None for call in update.calls for what in call.lacks}
        warning = found.warning or self.finder.warning
        if not lacks:
            return replace(found, warning=warning)
        return replace(
            found, remarks=(*found.remarks, "of another random draw"),
            warning=found.warning or (
                f"a call drew from {' and '.join(lacks)}, which it never did before and was not "
                "recorded: r is that of another draw. It is recorded from now on"
            ),
        )  # fmt: skip

    def _checked(self, update: Update) -> Measurement:
        refuse_flattened(update.params)
        if update.is_sharded:
            # Every forward pass gathers: ranks that ran different ones would wait for each other.
            return _measurement(self.estimator, self._smallest(self.estimator, update))
        warning = None
        try:
            smallest = self._smallest(self.estimator, update)
        except RuntimeError as error:
            is_final = isinstance(error, (MissingTangentError, LogitsNotFoundError))
            if is_final or self.estimator is not Estimator.JVP:
                raise
            smallest = self._fall_back(error, update)
            warning = (
                f"{culprit(error, self._module)} has no forward-mode derivative "
                f"({_first_sentence(error)}); r is measured by finite difference from now on"
            )
        found = _measurement(self.estimator, smallest, warning=warning)
        return found if self._agreements >= CHECKED_STEPS else self._check(found, smallest, update)

    def _smallest(
        self, estimator: Estimator, update: Update, sizes: list[Tensor] | None = None
    ) -> BatchRadius:
        """Return the smallest radius of the batch, and note the sizes of the logits."""
        calls, params, start = update.calls, update.params, update.start
        rows: Generator[LogitTangent, None, None]
        if estimator is Estimator.SECANT and update.is_made:
            with closing(secant(calls, self._module, params, start, self.finder)) as rows:
                return self._rule.reduce(_noting_sizes(rows, sizes))
        estimate = {
            Estimator.JVP: self._jvp,
            Estimator.DIFFERENCE: difference,
            Estimator.SECANT: partial(difference, scale=1.0),  # before the update is made
        }[estimator]
        with (
            update.at_start(),
            closing(estimate(calls, self._module, params, update.change, self.finder)) as rows,
        ):
            return self._rule.reduce(_noting_sizes(rows, sizes))

    def _fall_back(self, error: RuntimeError, update: Update) -> BatchRadius:
        try:
            smallest = self._smallest(Estimator.DIFFERENCE, update)
        except Exception:
            raise error from None
        self.estimator = Estimator.DIFFERENCE
        return smallest

    def _check(self, found: Measurement, smallest: BatchRadius, update: Update) -> Measurement:
        """Return the measurement, or the larger r where a second estimator finds another one."""
        is_difference = self.estimator is Estimator.DIFFERENCE
        other = Estimator.SECANT if is_difference else Estimator.DIFFERENCE
        sizes: list[Tensor] = []
        try:
            second = self._smallest(other, update, sizes)
        except Exception as error:  # the step is measured; what could not be is the check
            self._agreements = CHECKED_STEPS  # it would fail again at every step
            warning = (
                f"r by {self.estimator.value} could not be checked by {other.value} "
                f"({_first_sentence(error)})"
            )
            return replace(found, warning=found.warning or warning)
        r, r_second = smallest.spread / math.pi, second.spread / math.pi
        is_beyond_secant = Estimator.SECANT in (self.estimator, other) and min(r, r_second) > 1
        if is_beyond_secant or not math.isfinite(r + r_second):
            return found
        if abs(r - r_second) <= TOLERANCE * max(r, r_second) + self._noise(update, sizes, other):
            self._agreements += 1
            return found
        return self._disagreement(found, smallest, second, update, other)

    def _noise(self, update: Update, sizes: Sequence[Tensor], other: Estimator) -> float:
        """Return how far rounding alone may put the r of a difference off."""
        eps = torch.finfo(working_dtype(update.calls, update.params, self.finder)).eps
        size = float(torch.stack(list(sizes)).max()) if sizes else 0.0
        scale = difference_scale(update.calls, update.start, update.change, self.finder)
        if Estimator.SECANT in (self.estimator, other):
            scale = min(1.0, scale)
        return _ROUNDING * eps * size / (scale * math.pi)

    def _disagreement(
        self,
        found: Measurement,
        smallest: BatchRadius,
        second: BatchRadius,
        update: Update,
        other: Estimator,
    ) -> Measurement:
        self._agreements = 0
        if not is_repeatable(update.calls, self._module, self.finder):
            why = (
                "a call that is repeated gives other logits: it draws from a random generator that "
                "is out of reach, and r is that of another draw"
            )
        else:
            why = "the larger r counts"
            smallest = max(smallest, second, key=lambda each: each.spread)
        remark = f"r {found.spread / math.pi:.3g}; {other.value} r {second.spread / math.pi:.3g}"
        warning = found.warning
        if not self._has_disagreed:
            warning = warning or (
                f"two estimators of one step differ: {self.estimator.value} {remark}; {why}"
            )
        self._has_disagreed = True
        return _measurement(self.estimator, smallest, remarks=(remark,), warning=warning)


def _measurement(estimator: Estimator, smallest: BatchRadius, **others: Any) -> Measurement:
    return Measurement(
        estimator, radius=smallest.radius, spread=smallest.spread, bottleneck=smallest.index,
        head=smallest.head, **others,
    )  # fmt: skip


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


def _noting_sizes(
    rows: Iterable[LogitTangent], sizes: list[Tensor] | None
) -> Iterator[LogitTangent]:
    if sizes is None:
        yield from rows
        return
    for row in rows:
        logits = row.logits
        absent = absent_classes(logits)  # a mask of -1e9 is no number that anything is rounded by
        finite = (logits if absent is None else logits.masked_fill(absent, 0.0)).nan_to_num(
            neginf=0.0, posinf=0.0
        )
        sizes.append(finite.abs().amax().double())
        yield row
