"""Run the batch of a step that went wrong again: was it the data or the rate, or this machine?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from safestep.capture.call import Call
from safestep.capture.failures import one_line
from safestep.capture.hooks import is_passed_on
from safestep.capture.isolation import without_side_effects
from safestep.capture.results import Sameness, compare, compare_outputs, loss_of
from safestep.guard.journal import Journal
from safestep.guard.kept_batches import KeptBatches
from safestep.guard.step_report import StepReport
from safestep.measure.update import Measurement, Update
from safestep.parallel.ranks import Ranks

_SAME_IN_A_ROW = 10  # after which only every power of two is run again


class SecondRun:
    """Run the forward calls of a step that the guard touches again, without a trace.

    From the same parameters, inputs, buffers and random state a sound machine computes the same
    outputs. Compared are outputs of up to 65,536 numbers in full, of larger ones the smallest and
    the largest number; of a function that was passed to ``SafeStep.record`` the loss, if that is
    logged as ``loss``. The backward pass is not repeated: `gradient_ratio` audits the gradient.

    A second run takes one forward pass. After ten interventions in a row that gave the same, only
    those of a number that is a power of two are run again.

    Args:
        module: The root module of the calls.
        ranks: The ranks that take the step.
        journal: Knows the run and the logged loss.
        kept: Keeps the inputs.
    """

    def __init__(
        self, module: nn.Module, ranks: Ranks, journal: Journal, kept: KeptBatches
    ) -> None:
        self._module, self._ranks, self._journal, self._kept = module, ranks, journal, kept
        self._same_in_a_row = 0

    def explain(self, report: StepReport, measurement: Measurement, update: Update) -> StepReport:
        """Return the report with what a second run shows, and the row that set the radius.

        Args:
            report: The decision about a step.
            measurement: What it rests on.
            update: The step.

        Returns:
            The report, unchanged where the step was neither scaled down nor not finite.
        """
        is_touched = report.status in ("clipped", "skipped")
        if not (is_touched or measurement.finding.forbids_step):
            return report
        try:
            report = _with_reason(report, _place(measurement, update.calls))
            report = _with_result(report, self._rerun(update))
            name = self._kept.keep(
                self._journal.run, report.step, report.reason or "", update.calls
            )
            return _with_reason(report, name and f"its inputs are in {name}")
        except Exception as error:  # the decision stands
            if is_passed_on(error):
                raise
            return _with_result(report, f"unknown: {one_line(error)}")

    def _rerun(self, update: Update) -> str | None:
        count = self._same_in_a_row + 1
        if count <= _SAME_IN_A_ROW or not count & (count - 1):
            return self._run_again(update)
        self._same_in_a_row = count
        return None

    def _run_again(self, update: Update) -> str:
        sameness, why = self._compare(update)
        rows = [float(sameness)]
        if self._ranks.size > 1:
            what = "whether its batch gives the same again"
            rows = self._ranks.gather(rows, what).flatten().tolist()
        worst = Sameness(int(max(rows)))
        self._same_in_a_row = self._same_in_a_row + 1 if worst < Sameness.OTHER else 0
        result = worst.name.lower()
        if worst is Sameness.UNKNOWN:
            return f"{result}: {self._first_reason(why)}"
        if worst is not Sameness.OTHER or self._ranks.size == 1:
            return result
        off = [rank for rank, row in enumerate(rows) if row == worst]
        return f"{result}: rank{'s' * (len(off) > 1)} {', '.join(map(str, off))}"

    def _first_reason(self, why: str | None) -> str | None:
        if self._ranks.size == 1:
            return why
        texts = self._ranks.gather_texts(why, "why its batch was not run again")
        return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), None)

    def _compare(self, update: Update) -> tuple[Sameness, str | None]:
        """Return how alike the first and the second run are, and why that is not known."""
        calls = update.calls
        obstacle = next((call.obstacle for call in calls if call.obstacle is not None), None)
        if obstacle is not None or not calls:
            return Sameness.UNKNOWN, obstacle or "no forward call was recorded"
        if any(call.kept.have_moved(set(update.params)) for call in calls):
            return Sameness.UNKNOWN, "another optimizer has moved parameters since"
        if any(call.is_elsewhere for call in calls):
            return Sameness.UNKNOWN, "the parameters moved between the forward call and the step"
        try:
            outputs = self._outputs(update)
            sameness = _sameness(calls, outputs, self._journal.loss)
        except Exception as error:
            return Sameness.UNKNOWN, one_line(error)
        lacks = sorted({what for call in calls for what in call.lacks})
        if lacks and sameness > Sameness.ROUNDED:
            return Sameness.UNKNOWN, f"a call drew from {' and '.join(lacks)}, which was not kept"
        return sameness, _UNSEEN if sameness is Sameness.UNKNOWN else None

    def _outputs(self, update: Update) -> list[Any]:
        outputs = []
        with update.alone(), torch.no_grad(), update.at_start():
            for call in update.calls:
                with without_side_effects(self._module, call.unused_generators):
                    outputs.append(call.run())
        return outputs


_UNSEEN = (
    "the result of the first run was not kept, as that of a recorded function whose loss is not "
    "logged with guard.log(loss=loss), or a large output that 'auto' does not watch"
)


_SECOND_RUNS = {
    "same": (
        "run again, its batch gives the same result bit for bit: the data or the rate is the "
        "cause, not this machine"
    ),
    "rounded": (
        "run again, its batch gives the same result up to rounding: the data or the rate is the "
        "cause, not this machine"
    ),
    "other": (
        "run again, its batch gives another result{where}: this machine, or state outside the "
        "model, is the cause"
    ),
    "unknown": "its batch was not compared with a second run: {why}",
}


def _with_result(report: StepReport, result: str | None) -> StepReport:
    if result is None:
        return report
    kind, _, detail = result.partition(": ")
    told = _SECOND_RUNS[kind].format(why=detail, where=f" on {detail}" if detail else "")
    return replace(_with_reason(report, told), second_run=result)


def _with_reason(report: StepReport, more: str | None) -> StepReport:
    return replace(report, reason="; ".join(filter(None, (report.reason, more))) or None)


def _sameness(calls: Sequence[Call], outputs: Sequence[Any], loss: Any) -> Sameness:
    told = [output for call, output in zip(calls, outputs, strict=True) if call.results is None]
    seen = [
        compare_outputs(call.results, output)
        for call, output in zip(calls, outputs, strict=True)
        if call.results is not None
    ]
    if told:
        seen.append(_sameness_of_losses(list(map(loss_of, told)), loss))
    return max(seen)


def _sameness_of_losses(again: list[Tensor | None], loss: Any) -> Sameness:
    # The logged one is that of the one call, or the sum or mean of several.
    losses = [each for each in again if each is not None]
    if loss is None or len(losses) < len(again):
        return Sameness.UNKNOWN
    total = sum(losses[1:], losses[0])
    first = torch.as_tensor(loss, device=total.device).reshape(()).to(total.dtype)
    return min(compare([first], [other]) for other in (total, total / len(losses)))


def _place(measurement: Measurement, calls: Sequence[Call]) -> str | None:
    """Return which example, and which token of it, set the radius."""
    row = measurement.row
    if row is None or measurement.bottleneck < 0:
        return None
    index, shape = row.index, row.shape
    size = next((leaf.shape[0] for call in calls[:1] for leaf in call.leaves
                 if isinstance(leaf, Tensor) and leaf.ndim), 0)  # fmt: skip
    if len(shape) == 1 and size and shape[0] > size and shape[0] % size == 0:
        index = divmod(index[0], shape[0] // size)  # the loss flattened examples and tokens
    example, *token = index
    where = f"example {example}"
    if token:
        where += f", token {token[0]}" if len(token) == 1 else f", place {tuple(token)}"
    if len(calls) > 1 and row.sets % len(calls) == 0:
        where = f"micro-batch {row.set * len(calls) // row.sets}, {where}"
    return f"row {measurement.bottleneck} ({where}) set the radius"
