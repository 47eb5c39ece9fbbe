"""Keep the last states of a run in memory, and go back to the oldest of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safestep._warn import warn_user
from safestep.capture.failures import one_line
from safestep.capture.unwinding import completed
from safestep.guard.copies import Copies
from safestep.guard.optimizer_state import OptimizerState
from safestep.guard.step_report import StepReport
from safestep.parallel.present import ABSENT
from safestep.parallel.ranks import Ranks
from safestep.parallel.shards import reshard

State = dict[str, Any]


class Rollback:
    """Keep a run as it was before each of its last steps, and go back to the first of these.

    It also counts interventions in a row. Where `after` of them have come, it goes back by itself,
    once: again only when a step has been left alone since. A trouble that a return does not end
    cannot hold the run at one place.

    Args:
        optimizer: The optimizer; the options of its groups are part of its state.
        module: The module whose buffers go back with the parameters.
        steps: How many steps to go back; None keeps nothing.
        after: Interventions in a row that let it go back by itself; None for never.
        guard: Returns the guard's state, and takes it again.
        ranks: All of them go back together, or none does.

    Attributes:
        obstacle: Why nothing is kept, else None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        steps: int | None,
        after: int | None,
        guard: tuple[Callable[[], State], Callable[[State], None]],
        ranks: Ranks,
    ) -> None:
        self.obstacle: str | None = None
        self._optimizer, self._module, self._ranks = optimizer, module, ranks
        self._get, self._put = guard
        self._steps, self._after = steps, after
        self._past: deque[_Past] = deque()
        self._buffers: _Buffers | None = None  # as the latest step left them
        self._spare: _Buffers | None = None  # whose memory can be used again
        self._kept = 0  # snapshots so far
        self._in_a_row = 0
        self._is_spent = False  # it went back, and no step was left alone since

    def begin(self) -> str | None:
        """Keep the run as it is before a step.

        Returns:
            What this takes in memory, at the second step: by then the optimizer has its state.
        """
        if self._steps is None or self.obstacle is not None:
            return None
        try:
            self._keep(self._get())
        except Exception as error:  # most likely out of memory
            self._past.clear()
            self.obstacle = one_line(error)
            warn_user(f"SafeStep: no step can be rolled back: {self.obstacle}.")
            return None
        self._kept += 1
        return self._size() if self._kept == 2 else None

    def after(self, report: StepReport | None) -> StepReport | None:
        """End a step: go back if it was one intervention too many.

        Args:
            report: What was done about the step; None if it passed unseen.

        Returns:
            The report, of status "rolled back" if the run went back.
        """
        if self._steps is None:
            return report
        if report is not None and self._is_due(report):
            r, reason = report.normalized_step, report.reason
            last = "; ".join(text for text in (f"r = {r:.3g}" * isfinite(r), reason) if text)
            why = f"{self._after} steps in a row were clipped or skipped (the last: {last})"
            return self._go_back(report, why)
        self._buffers, self._spare = _Buffers.of(self._module, self._spare), None
        return report

    def on_call(self, last: StepReport | None, *, is_within: bool) -> StepReport:
        """Go back because the user says so; on every rank.

        Args:
            last: The report of the latest step.
            is_within: Whether a step is under way.

        Returns:
            The report, of status "rolled back".

        Raises:
            RuntimeError: If there is nothing to go back to, or ranks would go to other steps.
        """
        if self._steps is None or is_within:
            got = "a call within a step" if self._steps else "`rollback` of None"
            raise RuntimeError(
                _expected(f"a guard that keeps the last steps, between two of them, got {got}")
            )
        rows = self._ranks.gather([self._target], "its call of roll_back()")
        targets = sorted(set(rows.flatten().tolist()) - {ABSENT})
        if len(targets) > 1:
            raise RuntimeError(
                _expected(f"all ranks to go back to one step, got the steps {targets}")
            )
        if last is None or targets == [-1]:
            got = self.obstacle or "none: no step was made since it was attached or went back"
            raise RuntimeError(_expected(f"a step to go back to, got {got}"))
        return self._go_back(last, "roll_back() was called")

    def state_dict(self) -> State:
        """Return what a resumed run needs; the past itself stays in this process."""
        if self._steps is None:
            return {}
        return {"rollback": {"in_a_row": self._in_a_row, "is_spent": self._is_spent}}

    def load_state_dict(self, state: State) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        own = state.get("rollback", {"in_a_row": 0, "is_spent": False})
        self._in_a_row, self._is_spent = own["in_a_row"], own["is_spent"]
        self._past.clear()  # of another run
        self._buffers = None

    @property
    def _target(self) -> int:
        return self._past[0].step if self._past else -1

    def _is_due(self, report: StepReport) -> bool:
        # Counts the step as well. All ranks go back now, or none does.
        is_touched = report.status in ("clipped", "skipped")
        self._in_a_row = self._in_a_row + 1 if is_touched else 0
        self._is_spent &= is_touched
        if self._after is None:
            return False
        is_due = self._in_a_row >= self._after and not self._is_spent
        if self._ranks.size == 1:
            return is_due and bool(self._past)
        rows = self._ranks.gather([is_due, self._target], "whether it rolls back")
        targets = {target for _, target in rows.tolist()} - {ABSENT}
        return bool((rows[:, 0] == 1).any()) and len(targets) == 1 and -1 not in targets

    def _keep(self, guard: State) -> None:
        past, spare, buffers = self._past, None, self._buffers
        if past and past[-1].step == guard["step"]:  # that step raised, and is made again
            spare = past.pop()
            buffers = spare.buffers
        elif len(past) == self._steps:
            spare = past.popleft()
            self._spare = spare.buffers
        state = past[-1].state if past else None
        if state is not None and state.is_still_of(self._optimizer):
            state = replace(state)
        else:
            state = OptimizerState.of(self._optimizer)
        state.note_options(self._optimizer)
        copies = _filled(state.tensors, spare and spare.copies)
        buffers = buffers or _Buffers.of(self._module, None)
        past.append(_Past(guard["step"], guard, state, copies, buffers))
        self._buffers = None

    def _go_back(self, report: StepReport, why: str) -> StepReport:
        past = self._past[0]
        completed(partial(self._return_to, past, self._get()["skips_in_a_row"]))
        self._past.clear()
        self._buffers, self._spare = past.buffers, None
        self._in_a_row, self._is_spent = 0, True
        return replace(
            report, status="rolled back", scale=0.0, effective_learning_rate=0.0,
            reason=f"{why}: parameters, buffers, optimizer state and guard are those from before "
            f"step {past.step}",
        )  # fmt: skip

    def _return_to(self, past: _Past, skips: int) -> None:
        past.put_back()
        reshard(self._module)
        # Skips are counted on: a run that does not get over its trouble still ends.
        self._put({**past.guard, "skips_in_a_row": skips, "run": None})

    def _size(self) -> str:
        count, one = self._steps or 0, self._past[-1].size / 1e6
        where = " on each rank" if self._ranks.size > 1 else ""
        return (
            f"rollback={count} keeps {count} snapshots of {one:.3g} MB, "
            f"{count * one:.3g} MB in all{where}"
        )


def _expected(what: str) -> str:
    return (
        f"SafeStep.roll_back: expected {what}. Make the guard with rollback=10, for instance, and "
        "call this after optimizer.step(), on every rank."
    )


@dataclass(slots=True)
class _Past:
    """A run as it was before a step."""

    step: int
    guard: State
    state: OptimizerState
    copies: Copies
    buffers: _Buffers

    @torch.no_grad()
    def put_back(self) -> None:
        """Write everything but the guard's state back to where it came from."""
        self.copies.put_back()
        self.state.put_back()
        self.buffers.put_back()

    @property
    def size(self) -> int:
        """Size of the copies in bytes."""
        return self.copies.size + self.buffers.copies.size


@dataclass(slots=True)
class _Buffers:
    """The buffers of a module as one step left them, before the next forward pass wrote to them."""

    tables: list[tuple[Any, dict[str, Tensor | None]]]
    copies: Copies

    @classmethod
    def of(cls, module: nn.Module, spare: _Buffers | None) -> _Buffers:
        """Return the present ones, in the memory of `spare` if that fits."""
        tables = [each._buffers for each in module.modules() if len(each._buffers)]
        contents = [dict(table) for table in tables]
        tensors = [it for content in contents for it in content.values() if it is not None]
        copies = _filled(tensors, spare and spare.copies)
        return cls(list(zip(tables, contents, strict=True)), copies)

    def put_back(self) -> None:
        """Write the numbers back, into the tensors that were buffers then."""
        self.copies.put_back()
        for table, content in self.tables:
            present = dict(table)
            for name, tensor in content.items():
                if present.get(name) is not tensor:
                    table[name] = tensor


def _filled(tensors: list[Tensor], spare: Copies | None) -> Copies:
    """Return copies of tensors, in memory that is there already if that fits."""
    copies = spare if spare is not None and spare.fit(tensors) else Copies(tensors, [])
    copies.fill()
    return copies
