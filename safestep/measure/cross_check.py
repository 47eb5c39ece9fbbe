"""Measure an update with an estimator that works for the model, and check it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from math import inf, isfinite, nan, pi
from typing import Any

import torch
from torch import nn

from safestep.capture import LogitFinder, LogitsFn, LogitsNotFoundError
from safestep.measure.doubts import (
    INSTEAD,
    first_sentence,
    lacks_derivative,
    may_lack_derivative,
    of_a_difference,
    of_another_draw,
)
from safestep.measure.estimators import LogitTangent, MissingTangentError, is_repeatable
from safestep.measure.finite_difference import Difference, ErrorBand, Outcome
from safestep.measure.gradient_audit import GradientAudit, OwnGradients
from safestep.measure.inner_radii import InnerWatch
from safestep.measure.part_of_batch import PartOfBatch
from safestep.measure.precision import coarsest, is_half
from safestep.measure.schedule import Schedule
from safestep.measure.second_gradient import Mean, SecondGradient
from safestep.measure.update import Estimator, Measurement, Update
from safestep.parallel.placements import is_tensor_parallel
from safestep.parallel.ranks import Ranks
from safestep.parallel.shards import is_flattened, refuse_hybrids
from safestep.radius.batch import BatchRadius, BatchRule

_FIRST_CHECKS = 3  # measurements, all checked; after them the gaps grow
_ROUNDING, _ROUNDING_HALF = 1e-3, 0.05  # relative, between a batch and a part of it
# That the model has no forward-mode derivative is not the reason of these.
_OTHER_REASONS = (MissingTangentError, LogitsNotFoundError, torch.OutOfMemoryError)
# Differences that go ever nearer where r is over 1, until two in a row have this ratio or less.
_APPROACHES, _SETTLED = 4, 1.2
_NEARER = (
    4.0  # where logits curve, secants of whole updates find half of r; of a quarter, most of it
)


class CheckedEstimator:
    """Measure updates of one model, and check the measurement by a second estimator.

    Where forward-mode automatic differentiation fails, the finite difference takes over; forward
    mode is tried again ever more rarely. The first measurements are checked by a finite difference,
    then ever fewer as long as the two agree. Where they differ by more than the error of the
    difference, the difference counts, and the next measurement is checked too.

    Args:
        module: The root module of the calls.
        rule: How the rows of a batch become one radius.
        ranks: The ranks that measure together where they hold shards.
        estimator: The estimator to begin with.
        logits: The user's way from an output to its logits.
        inside: Looks inside the model wherever the estimator is "jvp".
        part: Learns what a part of a batch tells about all of it; None where all is measured.
        own: Returns the gradients before the all-reduce; None on a lone rank.

    Attributes:
        estimator: The estimator in use.
        finder: Says which logits were found, and what is doubtful about them.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: BatchRule,
        ranks: Ranks,
        estimator: Estimator = Estimator.JVP,
        logits: LogitsFn | None = None,
        inside: InnerWatch | None = None,
        part: PartOfBatch | None = None,
        own: OwnGradients | None = None,
    ) -> None:
        self.estimator = estimator
        self._module = module
        self._rule = rule
        self._inside = inside
        self.finder = LogitFinder(logits)
        self._part, self._own, self._ranks = part, own, ranks
        self._checks = Schedule(_FIRST_CHECKS)
        self._retries = Schedule()
        self._has_fallen_back = False
        self._is_doubtful = False  # the last check found another r
        self._has_warned = False

    @property
    def trusts_secants(self) -> bool:
        """Return whether a secant saves time, and is known to measure the same as the estimator."""
        return self.estimator is Estimator.JVP and not self._is_doubtful

    def can_sample(self, update: Update) -> bool:
        """Return whether a part of the batch is known to tell enough of one update.

        Args:
            update: The update.
        """
        if self._part is None or self.estimator is not Estimator.JVP or self._is_doubtful:
            return False
        return self._rule.quantile is None and self._part.can_tell(update)

    def measure(self, update: Update, quick: Estimator | None = None) -> Measurement:
        """Return what is measured of one update.

        Args:
            update: The update.
            quick: The secant or the sample, if that will do; nothing checks it.

        Returns:
            The measurement, without a step norm.

        Raises:
            RuntimeError: If no estimator works, or no tangent reaches the logits.
        """
        with update.alone():
            found = self._found(update, quick)
        if self.finder.understates:
            found = replace(found, remarks=(*found.remarks, "r may be larger"))
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

    def second_gradient(self, update: Update, mean: Mean | None = None) -> SecondGradient:
        """Return how the gradient of an update compares with one that is computed once more.

        Args:
            update: The update.
            mean: Averages gradients over the ranks; None on a lone one.
        """
        return SecondGradient.of(update, self._module, is_coarse=self._is_half(update), mean=mean)

    def _found(self, update: Update, quick: Estimator | None) -> Measurement:
        if quick is Estimator.SAMPLED:
            return self._sampled(update)
        if quick is Estimator.SECANT:
            return self._by_secant(update)
        return self._checked(update)

    def _checked(self, update: Update) -> Measurement:
        if update.is_sharded:
            return self._of_shards(update)
        if self._has_fallen_back and self._retries.is_due():
            self.estimator = Estimator.JVP
        if self.estimator is Estimator.DIFFERENCE:
            return self._by_difference(update)
        try:
            found = self._measured(update)
        except RuntimeError as error:
            if isinstance(error, _OTHER_REASONS) or self.estimator is not Estimator.JVP:
                raise
            return self._fall_back(error, update)
        self._has_fallen_back = False
        return self._check(found, update) if self._checks.is_due() else found

    def _of_shards(self, update: Update) -> Measurement:
        # All ranks must run the same passes: in each of them they wait for each other.
        refuse_hybrids(self._module)
        warning = None
        if any(map(is_flattened, update.params)) and self.estimator is Estimator.JVP:
            self.estimator = Estimator.DIFFERENCE  # flattened parameters lose their tangents
        if self.estimator is Estimator.JVP and is_tensor_parallel(update.params, self._module):
            exact, warning = self._of_pieces(update)
            if exact is not None:
                return exact
            self.estimator = Estimator.DIFFERENCE
        if self.estimator is not Estimator.DIFFERENCE:
            return self._measured(update)
        found = self._difference(update)  # once: each rank would decide on a second alone
        is_usual = found.error <= self._usual_error(Estimator.DIFFERENCE, update) * found.r
        remarks = () if is_usual or not isfinite(found.r) else (str(found),)
        return _measurement(self.estimator, found.smallest, remarks=remarks, warning=warning)

    def _of_pieces(self, update: Update) -> tuple[Measurement | None, str | None]:
        # What forward mode measures under tensor parallelism, or None and why it fails. A rank
        # that fell back alone would answer the others' collectives with its own.
        found, error = _tried(self._measured, update)
        is_measured, lacks = self._all_are(error is None, may_lack_derivative(error))
        if lacks and error is not None:
            return None, lacks_derivative(error, self._module) + INSTEAD
        if error is not None:
            raise error
        if not (is_measured and self._checks.is_due()):
            return found, None
        second, error = _tried(self._difference, update)
        r, usual = found.spread / pi, self._usual_error(Estimator.JVP, update)
        is_other = error is None and isfinite(r) and second.compare(r, usual) is Outcome.DIFFERS
        is_checked, is_same = self._all_are(error is None, not is_other)
        if error is not None:
            raise error
        if not is_same and is_checked:
            return None, of_a_difference(found.estimator, r, second)
        if is_checked:
            self._checks.relax()
        return found, None

    def _all_are(self, *flags: bool) -> list[bool]:
        return self._ranks.all_are(*flags, what="whether it could run the model again")

    def _measured(self, update: Update) -> Measurement:
        """Return what the estimator in use measures, and the slopes of the loss if it is exact."""
        if self.estimator is not Estimator.JVP:
            return _measurement(self.estimator, self._smallest(self.estimator, update))
        audit = GradientAudit(update, self._own)
        self.finder.show = audit.see
        try:
            with closing(self._rows(self.estimator, update)) as rows:
                noted = rows if self._part is None else self._part.noting(rows, update)
                smallest = self._rule.reduce(noted)
        finally:
            self.finder.show = None
        if self._part is not None:
            self._try(self._part, smallest, update)
        slopes = audit.compared(is_coarse=self._is_half(update))
        return _measurement(self.estimator, smallest, slopes=slopes)

    def _sampled(self, update: Update) -> Measurement:
        """Return what the first examples tell of the batch.

        Raises:
            RuntimeError: If they are not known to tell enough: another rank's are.
        """
        if self._part is None or not self.can_sample(update):
            raise RuntimeError("a part of the batch is not known to tell enough of all")
        try:
            found = self._smallest(Estimator.SAMPLED, self._part.of(update))
        except Exception:
            self._part.distrust()
            raise
        return self._part.estimate(update, found)

    def _try(self, part: PartOfBatch, whole: BatchRadius, update: Update) -> None:
        """Learn from a measurement what a part of the batch tells, and check it now and then."""
        first = part.learn(whole)
        if not part.is_due(first):
            return
        try:
            alone = self._smallest(Estimator.SAMPLED, part.of(update)).spread
        except Exception:  # the step is measured; only whole batches can be
            alone = nan
        part.compare(first, alone, _ROUNDING_HALF if self._is_half(update) else _ROUNDING)

    def _by_secant(self, update: Update) -> Measurement:
        # Rounding hides a part of an update in half precision.
        is_coarse = self._is_half(update) or any(call.autocast for call in update.calls)
        smallest = self._smallest(Estimator.SECANT, update, 1.0 if is_coarse else _NEARER)
        return _measurement(Estimator.SECANT, smallest)

    def _smallest(self, estimator: Estimator, update: Update, reach: float = 1.0) -> BatchRadius:
        """Return the smallest radius of the batch."""
        with closing(self._rows(estimator, update, reach)) as rows:
            return self._rule.reduce(rows)

    def _difference(self, update: Update, reach: float = 1.0) -> Difference:
        errors = ErrorBand()
        with closing(self._rows(Estimator.DIFFERENCE, update, reach)) as rows:
            return Difference.of(self._rule.reduce(errors.noting(rows)), errors)

    def _rows(
        self, estimator: Estimator, update: Update, reach: float = 1.0
    ) -> Generator[LogitTangent, None, None]:
        assert estimator.run is not None, f"{estimator.value} runs nothing"
        return estimator.run(update, self._module, self.finder, self._inside, reach)

    def _by_difference(self, update: Update) -> Measurement:
        """Return what the difference measures, its error too where that is large."""
        found = self._settled_difference(update)
        if found.is_sure or not isfinite(found.r):
            return _measurement(Estimator.DIFFERENCE, found.smallest)
        warning = None
        if self._checks.is_due():
            self._checks.relax()
            warning = None if self._is_repeatable(update) else of_another_draw()
        return _measurement(
            Estimator.DIFFERENCE, found.smallest, remarks=(str(found),), warning=warning
        )

    def _settled_difference(self, update: Update) -> Difference:
        """Return a difference that goes no further than the logits are linear, if one can."""
        found = self._difference(update)
        goes_all_the_way = _has_half_parameters(update)
        for _ in range(_APPROACHES):
            if not 1 < found.r < inf or (found.is_sure and not goes_all_the_way):
                break
            nearer = self._difference(update, found.r)
            if max(found.r, nearer.r) < _SETTLED * min(found.r, nearer.r):
                return min(found, nearer, key=lambda each: each.error / each.r)
            found = replace(nearer, error=max(nearer.error, abs(nearer.r - found.r)))
        return found

    def _fall_back(self, error: RuntimeError, update: Update) -> Measurement:
        obstacle = lacks_derivative(error, self._module)
        try:
            found = self._by_difference(update)
        except LogitsNotFoundError as other:
            raise LogitsNotFoundError(f"{obstacle}, and {other}") from error
        except Exception:
            raise error from None
        self.estimator, self._has_fallen_back = Estimator.DIFFERENCE, True
        self._retries.relax()
        return replace(found, warning=f"{obstacle}{INSTEAD}")

    def _check(self, found: Measurement, update: Update) -> Measurement:
        """Return the measurement, or that of the difference where the two surely differ."""
        name, r = found.estimator.value, found.spread / pi
        if not isfinite(r):
            return found
        try:
            second = self._difference(update, max(1.0, r))
        except Exception as error:  # the step is measured; what could not be is the check
            self._checks.relax(at_once=True)
            text = first_sentence(error)
            if isinstance(error, MissingTangentError) and self._is_half(update):
                return replace(found, remarks=(f"not checked: {text}",))  # rounded away
            warning = f"r by {name} could not be checked by difference ({text})"
            return replace(found, warning=found.warning or warning)
        is_beyond_secant = found.estimator is Estimator.SECANT and min(r, second.r) > 1
        if is_beyond_secant or not isfinite(second.r):
            return found
        first = found.estimator
        outcome = second.compare(r, self._usual_error(first, update))
        goes_all_the_way = _has_half_parameters(update)
        if outcome is Outcome.DIFFERS and goes_all_the_way and min(r, second.r) > 1:
            outcome = Outcome.UNSETTLED  # beyond the radius the logits are not linear
        if outcome is Outcome.AGREES:
            self._is_doubtful = False
            self._checks.relax()
            return found
        return self._disputed(found, second, outcome, update)

    def _disputed(
        self, found: Measurement, second: Difference, outcome: Outcome, update: Update
    ) -> Measurement:
        """Return the measurement that counts where the difference does not confirm the first."""
        name, r = found.estimator.value, found.spread / pi
        if not self._is_repeatable(update):
            self._checks.relax()
            remark = f"r {r:.3g}; difference {second}"
            return replace(found, remarks=(remark,), warning=found.warning or of_another_draw())
        if outcome is Outcome.UNSETTLED:
            self._checks.relax()
            return replace(found, remarks=(f"not checked: difference {second}",))
        warning = None if self._has_warned else of_a_difference(found.estimator, r, second)
        self._is_doubtful = self._has_warned = True
        self._checks.reset()
        return _measurement(
            Estimator.DIFFERENCE, second.smallest, remarks=(f"r {second.r:.3g}; {name} r {r:.3g}",),
            warning=found.warning or warning,
        )  # fmt: skip

    def _is_half(self, update: Update) -> bool:
        return is_half(coarsest(self.finder.dtypes | {param.dtype for param in update.params}))

    def _usual_error(self, estimator: Estimator, update: Update) -> float:
        return estimator.error_half if self._is_half(update) else estimator.error

    def _is_repeatable(self, update: Update) -> bool:
        return is_repeatable(update.calls, self._module, self.finder)


def _has_half_parameters(update: Update) -> bool:
    return any(is_half(param.dtype) for param in update.params)


def _measurement(estimator: Estimator, smallest: BatchRadius, **others: Any) -> Measurement:
    return Measurement(
        estimator, radius=smallest.radius, spread=smallest.spread, bottleneck=smallest.index,
        head=smallest.head, reason=_EVERY_ROW if smallest.counts_every_row else None,
        loss=smallest.change, row=smallest.row, **others,
    )  # fmt: skip


_EVERY_ROW = (
    "no row has a gradient, so the update is momentum alone, and all rows of the batch count"
)


def _tried(measure: Callable[[Update], Any], update: Update) -> tuple[Any, Exception | None]:
    """Return what is measured, or None and the error."""
    try:
        return measure(update), None
    except Exception as error:
        return None, error
