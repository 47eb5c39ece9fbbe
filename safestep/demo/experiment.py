"""One training loop, run with and without protection against a spike.

The one line in `train` that makes a SafeStep protects a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from safestep.demo.tasks import Task
from safestep.guard.safe_step import SafeStep
from safestep.guard.step_report import StepReport


@dataclass(frozen=True, slots=True)
class Spike:
    """The learning rate is multiplied by `severity`, for one step or from there on."""

    severity: float
    is_held: bool

    def factor(self, steps_since: int) -> float:
        """Return the factor on the learning rate, so many steps after the spike's step."""
        is_on = steps_since >= 0 if self.is_held else steps_since == 0
        return self.severity if is_on else 1.0

    @property
    def name(self) -> str:
        """Name of its folder, such as ``x10000-held``."""
        if self.severity == 1:
            return "no-spike"
        return f"x{self.severity:g}-{'held' if self.is_held else 'single'}"

    @property
    def title(self) -> str:
        """Return how the table calls it, such as ``x10,000 held``."""
        if self.severity == 1:
            return "no spike"
        return f"x{self.severity:,g} {'held' if self.is_held else 'single'}"


@dataclass(frozen=True, slots=True)
class Protection:
    """A way to train: what keeps a spike from the parameters.

    Attributes:
        title: Name in the table and the figure.
        clip_norm: Largest norm of the gradient, None for any.
        guard: Options of SafeStep. "monitor" only measures: such a run is as if without it.
    """

    title: str
    clip_norm: float | None
    guard: dict[str, Any]

    @property
    def is_guarded(self) -> bool:
        """Whether safestep may change a step."""
        return self.guard.get("action") != "monitor"


PROTECTIONS = {
    "plain": Protection("plain", None, {"action": "monitor"}),
    "clip": Protection("clip at 1", 1.0, {"action": "monitor"}),
    "bound": Protection("safestep bound", None, {"radius": "bound"}),
    "certified": Protection("safestep certified", None, {"radius": "certified"}),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run gave.

    Attributes:
        losses: Training loss before each step.
        accuracies: Test accuracies after each step, or after the last one only, in percent.
        reports: What SafeStep measured at each step.
    """

    losses: list[float]
    accuracies: list[dict[str, float]]
    reports: list[StepReport]


def train(
    task: Task,
    spike: Spike,
    protection: Protection,
    *,
    seed: int,
    run_dir: Path | None = None,
    on_step: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Train once and return what happened.

    Args:
        task: What is trained.
        spike: What happens to the learning rate.
        protection: What stands against it.
        seed: Seed of the model and of the order of the data.
        run_dir: Folder for the run log, which ``safestep report`` reads.
        on_step: Called after each step with what happened so far.

    Returns:
        Loss, accuracy and report of every step.
    """
    model = task.model(seed)
    optimizer = task.optimizer(model)
    guard = SafeStep(optimizer, model, run_dir=run_dir, **protection.guard)  # the whole change
    clip_norm = 1.0 if protection.is_guarded and task.clips_under_guard else protection.clip_norm
    outcome = Outcome([], [], [])
    with guard:
        for step in range(task.num_steps):
            inputs, targets = task.batch(seed, step)
            rate = task.learning_rate(step) * spike.factor(step - task.spike_step)
            optimizer.param_groups[0]["lr"] = rate

            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            guard.log(loss=loss)
            optimizer.step()

            outcome.losses.append(loss.item())
            assert guard.last is not None
            outcome.reports.append(guard.last)
            if task.evaluates_every_step or step == task.num_steps - 1:
                outcome.accuracies.append(task.test_accuracy(model))
            on_step(outcome)
    return outcome
