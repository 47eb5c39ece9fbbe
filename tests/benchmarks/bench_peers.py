"""What guards against bad steps keep of a run: the same training under each, side by side.

Every rule trains the same models on the same data from the same seeds, healthy and in trouble. The
finished runs are in a JSON file, from which a table is printed; what is in it is not run again.

    python tests/benchmarks/bench_peers.py --json tests/benchmarks/peers.json

StableAdamW, schedule-free and Prodigy are taken from torch-optimi, schedulefree and prodigyopt, and
left out where these are not installed. The other peers are a few lines each, from their papers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any, ClassVar

import torch
from bench_step import GPT, Shape, _digits, _text, mlp
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep

STEPS = 300
TROUBLE = 150  # the step at which it begins


class Rule:
    """AdamW, and what a rule does to its steps; this one does nothing."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.touched = model, 0
        self.optimizer = self.make(lr)

    def make(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.1)

    def allows(self, loss: Tensor) -> bool:
        """Change the gradients; return whether the step may be taken."""
        return True

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def clip(self, limit: float) -> float:
        """Clip the joint norm, count where that changed anything, and return it."""
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.touched += norm > limit
        return norm

    def before_evaluation(self) -> None:
        """Put the weights that are to be evaluated in place."""

    def seen(self) -> int:
        """Return the number of steps that the rule touched."""
        return self.touched


class Clip(Rule):
    """The joint gradient norm at most 1."""

    def allows(self, loss: Tensor) -> bool:
        self.clip(1.0)
        return True


class ZClip(Rule):
    """Clip where the norm's z-score is over 2.5, to mean + 2.5^2 / z sigmas (arXiv:2504.02507)."""

    mean = variance = None
    warm: list[float]

    def allows(self, loss: Tensor) -> bool:
        norm = float(nn.utils.get_total_norm(self.gradients()))
        if self.mean is None:
            self.warm = [*getattr(self, "warm", []), norm]
            if len(self.warm) == 25:
                self.mean, self.variance = (
                    statistics.mean(self.warm),
                    statistics.variance(self.warm),
                )
            return True
        sigma = math.sqrt(self.variance)
        z = (norm - self.mean) / max(sigma, 1e-6)
        if z > 2.5 or not math.isfinite(z):
            norm = self.mean + 2.5**2 / z * sigma if math.isfinite(z) else self.mean
            self.clip(norm)
        self.mean = 0.97 * self.mean + 0.03 * norm
        self.variance = 0.97 * self.variance + 0.03 * (norm - self.mean) ** 2
        return True


class AdaGC(Rule):
    """Clip each tensor to 1.05 times its own running norm (arXiv:2502.11034, algorithm 1)."""

    step, norms = 0, None

    def allows(self, loss: Tensor) -> bool:
        self.step += 1
        grads = self.gradients()
        if self.step <= 100:
            self.clip(1.0)
            norms = torch._foreach_norm(grads)
            self.norms = (
                norms if self.norms is None else list(map(torch.minimum, self.norms, norms))
            )
            return True
        found = torch._foreach_norm(grads)
        scales = [
            (1.05 * kept / norm).clamp(max=1) for kept, norm in zip(self.norms, found, strict=True)
        ]
        self.touched += any(bool(scale < 1) for scale in scales)
        torch._foreach_mul_(grads, scales)
        self.norms = [
            0.98 * kept + 0.02 * (norm * scale)
            for kept, norm, scale in zip(self.norms, found, scales, strict=True)
        ]
        return True


class AGC(Rule):
    """Clip each unit's gradient to 0.01 of its weight's norm (arXiv:2102.06171, eq. 3)."""

    def allows(self, loss: Tensor) -> bool:
        is_touched = False
        for param in self.model.parameters():
            if param.grad is not None and param.ndim > 1:
                axes = tuple(range(1, param.ndim))
                limit = 0.01 * param.detach().norm(dim=axes, keepdim=True).clamp(min=1e-3)
                scale = limit / param.grad.norm(dim=axes, keepdim=True).clamp(min=1e-6)
                is_touched |= bool((scale < 1).any())
                param.grad.mul_(scale.clamp(max=1))
        self.touched += is_touched
        return True


class SkipStep(Rule):
    """Skip where loss or gradient norm is 6 sigmas over the last 128 (as OLMo-core does)."""

    def allows(self, loss: Tensor) -> bool:
        if not hasattr(self, "seen_values"):
            self.seen_values = deque(maxlen=128), deque(maxlen=128)
        is_outlier = False
        for seen, value in zip(self.seen_values, (float(loss), self.clip(1.0)), strict=True):
            if len(seen) >= 64:
                limit = statistics.mean(seen) + 6 * statistics.stdev(seen)
                is_outlier |= not value <= limit
            if math.isfinite(value):
                seen.append(value)
        self.touched += is_outlier
        return not is_outlier


class Stable(Rule):
    """AdamW with update clipping, RMS of update over denominator at most 1 (arXiv:2304.13013)."""

    def make(self, lr: float) -> torch.optim.Optimizer:
        from optimi import StableAdamW

        return StableAdamW(self.model.parameters(), lr=lr, weight_decay=0.1)


class ScheduleFree(Rule):
    """AdamW without a schedule (arXiv:2405.15682)."""

    def make(self, lr: float) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(self.model.parameters(), lr=lr, weight_decay=0.1)
        optimizer.train()
        return optimizer

    def before_evaluation(self) -> None:
        self.optimizer.eval()


class Prodigy(Rule):
    """A learning rate found by itself (arXiv:2306.06101); the given one is not used."""

    def make(self, lr: float) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy as Optimizer

        return Optimizer(self.model.parameters(), weight_decay=0.1)


class Guarded(Rule):
    """Clipping at 1, and a SafeStep."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model, lr)
        self.guard, self.changed = SafeStep(self.optimizer, model, **self.options), 0
        self.optimizer.register_step_post_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.changed += self.guard.last.scale != 1.0

    def allows(self, loss: Tensor) -> bool:
        self.clip(1.0)
        return True

    def seen(self) -> int:
        return self.changed


class Certified(Guarded):
    """The guard on the certified radius."""

    options: ClassVar = {"radius": "certified"}


class Set(Guarded):
    """Every step at r = 1: a learning rate from the radius alone."""

    options: ClassVar = {"action": "set"}


RULES: dict[str, type[Rule]] = {
    "nothing": Rule,
    "clip_grad_norm_": Clip,
    "ZClip": ZClip,
    "AdaGC": AdaGC,
    "AGC": AGC,
    "StableAdamW": Stable,
    "skip-step": SkipStep,
    "schedule-free": ScheduleFree,
    "Prodigy": Prodigy,
    "safestep, bound": Guarded,
    "safestep, certified": Certified,
    "safestep, set": Set,
}
NEEDS = {"StableAdamW": "optimi", "schedule-free": "schedulefree", "Prodigy": "prodigyopt"}


@dataclass(frozen=True)
class Task:
    """A model, its data and a learning rate that suits it.

    Attributes:
        lr: The learning rate.
        model: Makes the model.
        batch: Returns a batch of a generator's choice; what is evaluated where that is None.
    """

    lr: float
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator | None], tuple[Tensor, Tensor]]


def _characters(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    codes, size = _text(), 16
    held_out = len(codes) - 4096
    starts = torch.arange(held_out, len(codes) - 129, 128)[:, None]
    if generator is not None:
        starts = torch.randint(held_out - 129, (size, 1), generator=generator)
    tokens = codes[starts + torch.arange(129)]
    return tokens[:, :-1], tokens[:, 1:].flatten()


def _images(generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    inputs, targets = _digits()
    if generator is None:
        return inputs[:360], targets[:360]
    rows = 360 + torch.randint(len(inputs) - 360, (64,), generator=generator)
    return inputs[rows], targets[rows]


TASKS = {
    "character GPT": Task(1e-3, lambda: GPT(Shape(16, 64, 2, 128)), _characters),
    "digits MLP": Task(3e-3, lambda: mlp(Shape(64, 128, 3, 10)), _images),
}


# From the step to the factor of the learning rate, and to what is done to the targets or inputs.
SITUATIONS: dict[str, Callable[[int], float]] = {
    "healthy": lambda step: 1.0,
    "x1000 once": lambda step: 1000.0 if step == TROUBLE else 1.0,
    "x100 held": lambda step: 100.0 if step >= TROUBLE else 1.0,
    "x10 held": lambda step: 10.0 if step >= TROUBLE else 1.0,
    "no warm-up, rate x10": lambda step: 10.0,
    "poisoned labels, 20 steps": lambda step: 1.0,
    "a batch of NaN": lambda step: 1.0,
}


def _spoil(situation: str, step: int, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if situation.startswith("poisoned") and TROUBLE <= step < TROUBLE + 20:
        targets = targets.flip(0).roll(1)
    if situation == "a batch of NaN" and step == TROUBLE:
        logits = logits * math.nan
    return logits, targets


def run(task: Task, rule_type: type[Rule], situation: str, seed: int) -> dict[str, Any]:
    """Train once and return what came out."""
    torch.manual_seed(seed)
    model = task.model()
    rule = rule_type(model, task.lr)
    rates = [group["lr"] for group in rule.optimizer.param_groups]
    generator = torch.Generator().manual_seed(1000 + seed)
    losses, begin, error = [], process_time(), None
    for step in range(STEPS):
        warm = 1.0 if situation.startswith("no warm-up") else min(1.0, (step + 1) / 30)
        for group, rate in zip(rule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm * SITUATIONS[situation](step)
        inputs, targets = task.batch(generator)
        logits, targets = _spoil(situation, step, model(inputs).flatten(0, -2), targets)
        loss = cross_entropy(logits, targets)
        rule.optimizer.zero_grad()
        loss.backward()
        if rule.allows(loss.detach()):
            try:
                rule.optimizer.step()
            except RuntimeError as raised:
                error = str(raised)
                break
        losses.append(float(loss.detach()))
    seconds = process_time() - begin
    rule.before_evaluation()
    model.eval()
    with torch.no_grad():
        inputs, targets = task.batch(None)
        logits = model(inputs).flatten(0, -2)
        final = float(cross_entropy(logits, targets))
        accuracy = float((logits.argmax(-1) == targets).double().mean())
    return {
        "loss": final if math.isfinite(final) else None, "accuracy": accuracy,
        "touched": rule.seen(), "seconds": seconds, "error": error,
        "spikes": _spike_score(losses),
    }  # fmt: skip


def _spike_score(losses: list[float]) -> float:
    """Return the share of losses over the rolling mean of 64 by more than 7 standard deviations."""
    spikes = 0
    for index in range(32, len(losses)):
        before = [x for x in losses[max(0, index - 64) : index] if math.isfinite(x)]
        limit = statistics.mean(before) + 7 * statistics.stdev(before) if len(before) > 1 else 0.0
        spikes += not losses[index] <= limit
    return spikes / max(1, len(losses) - 32)


def table(found: dict[str, dict[str, Any]], task: str, seeds: int) -> str:
    """Return held-out losses, mean over the seeds and half their range, as a Markdown table."""
    lines = [f"| {task} | {' | '.join(SITUATIONS)} | touched, healthy | CPU time |"]
    lines.append("|" + "---|" * (len(SITUATIONS) + 3))
    plain = _mean(found, f"{task}|nothing|healthy", seeds, "seconds")
    for rule in RULES:
        if f"{task}|{rule}|healthy|0" not in found:
            continue
        cells = [_cell(found, f"{task}|{rule}|{situation}", seeds) for situation in SITUATIONS]
        touched = _mean(found, f"{task}|{rule}|healthy", seeds, "touched")
        seconds = _mean(found, f"{task}|{rule}|healthy", seeds, "seconds") / plain
        lines.append(f"| {rule} | {' | '.join(cells)} | {touched:.0f} | {seconds:.2f} |")
    return "\n".join(lines)


def _values(found: dict[str, dict[str, Any]], prefix: str, seeds: int, name: str) -> list[Any]:
    keys = [f"{prefix}|{seed}" for seed in range(seeds)]
    return [found[key][name] for key in keys if key in found]


def _mean(found: dict[str, dict[str, Any]], prefix: str, seeds: int, name: str) -> float:
    return statistics.mean(_values(found, prefix, seeds, name) or [math.nan])


def _cell(found: dict[str, dict[str, Any]], prefix: str, seeds: int) -> str:
    losses = _values(found, prefix, seeds, "loss")
    if not losses or None in losses:
        return "lost" if losses else ""
    return f"{statistics.mean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("peers.json"))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    rules = [rule for rule in RULES if rule not in NEEDS or find_spec(NEEDS[rule])]
    parser.add_argument("--rule", nargs="+", choices=RULES, default=rules)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    keys = [
        (task, rule, situation, seed)
        for seed in range(arguments.seeds)
        for task in arguments.task
        for situation in SITUATIONS
        for rule in arguments.rule
        if f"{task}|{rule}|{situation}|{seed}" not in found
    ]
    torch.set_num_threads(1)
    for task, rule, situation, seed in track(keys, "training"):
        found[f"{task}|{rule}|{situation}|{seed}"] = run(TASKS[task], RULES[rule], situation, seed)
        arguments.json.write_text(json.dumps(found, indent=0))
    for task in arguments.task:
        print(table(found, task, arguments.seeds), end="\n\n")
    print(f"Held-out loss after {STEPS} steps, {arguments.seeds} seeds; torch {torch.__version__}.")


if __name__ == "__main__":
    main()
