"""When should the guard act? Rules for steps over the limit, on runs that are healthy or spiked.

Every rule shortens a step to r = 1; they differ in which steps over r = 1 they leave alone. "bound"
leaves none; "c = ..." is `sufficient_decrease`. The others are variants that the package does not
have. Every step is measured exactly. Results are added to the file as they come; a result that is
there is not computed again.

    python tests/benchmarks/when_to_act.py --json when_to_act.json --seeds 0 1 2
    python tests/benchmarks/when_to_act.py --json when_to_act.json --seeds --table
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep
from safestep.demo.models import CharacterGPT
from safestep.demo.tasks import load_text
from safestep.guard.decrease import FLOOR, MEMORY, SufficientDecrease
from safestep.radius.loss_change import LossChange

STEPS, SPIKE = 240, 120
CLASSES, CONTEXT = 512, 48
LAST = 20  # steps whose mean loss is a language model's result


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(64, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128),
        nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10),
    )  # fmt: skip


def language_model() -> nn.Module:
    return CharacterGPT(CLASSES, CONTEXT, width=48, layers=2, heads=4)


MODELS = {"CNN": cnn, "MLP + LayerNorm": mlp, "language model": language_model}
OPTIMIZERS: dict[str, Callable] = {
    "Adadelta 1": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "SGD .1, momentum .9": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam 1e-3": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam 1e-2": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW 3e-3": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "AdamW 1e-2": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW 3e-2": lambda p: torch.optim.AdamW(p, lr=3e-2),
}
FACTORS: dict[str, Callable[[int], float]] = {
    "healthy": lambda step: 1.0,
    "x1000 once": lambda step: 1000.0 if step == SPIKE else 1.0,
    "x100 held": lambda step: 100.0 if step >= SPIKE else 1.0,
}


class Longer(SufficientDecrease):
    """c = 0, and the memory lasts as long as steps are shortened."""

    def shortens(self, step: int, change: LossChange) -> bool:
        """Return whether to shorten a step over the limit."""
        is_shortened = super().shortens(step, change)
        if is_shortened:
            self._last = step
        return is_shortened


class ByRadius(SufficientDecrease):
    """c grows from 0 at the limit to 1/2 at five times the limit."""

    r = 0.0  # of the step that is judged

    def shortens(self, step: int, change: LossChange) -> bool:
        """Return whether to shorten a step over the limit."""
        self._share = min(0.5, (self.r - 1) / 8)
        return super().shortens(step, change)


class ByHistory(SufficientDecrease):
    """c = 0, and the divergence is no more than four times the median of the last 32."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self._seen: deque[float] = deque(maxlen=32)

    def shortens(self, step: int, change: LossChange) -> bool:
        """Return whether to shorten a step over the limit."""
        usual = statistics.median(self._seen) if len(self._seen) > 8 else float("inf")
        is_unusual = change.divergence > 4 * max(usual, FLOOR)
        is_shortened = super().shortens(step, change)
        if not is_shortened:
            self._seen.append(change.divergence)
        if is_unusual and not is_shortened:
            self._last = step
        return is_shortened or is_unusual


class Wary(SufficientDecrease):
    """c = 0, and 1/2 for the eight memories after a step that rose."""

    def shortens(self, step: int, change: LossChange) -> bool:
        """Return whether to shorten a step over the limit."""
        self._rose = getattr(self, "_rose", -(10**9))
        if change.excess(0.0, FLOOR) > 1:
            self._rose = step
        self._share = 0.5 if step - self._rose <= 8 * MEMORY else 0.0
        return super().shortens(step, change)


class Unusual(SufficientDecrease):
    """c = 0, and a rise counts only if it is over three times the usual change of the last 32."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self._seen: deque[float] = deque(maxlen=32)

    def shortens(self, step: int, change: LossChange) -> bool:
        """Return whether to shorten a step over the limit."""
        rise = change.slope + change.divergence
        usual = statistics.median(self._seen) if len(self._seen) > 8 else 0.0
        is_usual = rise <= 3 * usual and not self._holds(step)
        is_shortened = not is_usual and super().shortens(step, change)
        if not is_shortened:
            self._seen.append(abs(rise))
        return is_shortened


RULES: dict[str, Callable[[], SufficientDecrease] | None] = {
    "plain": None,
    "bound": SufficientDecrease,
    "c = 1/2": lambda: SufficientDecrease(0.5),
    "c = 0": lambda: SufficientDecrease(0.0),
    "c = 0, longer memory": lambda: Longer(0.0),
    "c = 0 to 1/2 by r": lambda: ByRadius(0.0),
    "c = 0, by history": ByHistory,
    "c = 0, then 1/2": lambda: Wary(0.0),
    "c = 0, unusual rise": Unusual,
}


@dataclass(frozen=True)
class Situation:
    model: str
    optimizer: str
    factor: str

    def __str__(self) -> str:
        return f"{self.model}, {self.optimizer}, {self.factor}"


SITUATIONS = [
    *(
        Situation(model, optimizer, factor)
        for model in ("CNN", "MLP + LayerNorm")
        for optimizer in ("Adadelta 1", "SGD .1, momentum .9", "Adam 1e-3", "Adam 1e-2")
        for factor in ("healthy", "x100 held")
    ),
    *(
        Situation("language model", optimizer, factor)
        for optimizer, factor in (
            ("AdamW 3e-3", "healthy"), ("AdamW 3e-3", "x100 held"), ("AdamW 1e-2", "healthy"),
            ("AdamW 1e-2", "x100 held"), ("AdamW 3e-2", "healthy"),
        )
    ),
    Situation("CNN", "Adam 1e-3", "x1000 once"),
    Situation("language model", "AdamW 3e-3", "x1000 once"),
]  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(5))
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(bunch.target)[order]


@cache
def text() -> Tensor:
    """Return the demo's text in pairs merged by how often they occur: 512 classes."""
    codes, _, count = load_text()
    for new in range(count, CLASSES):
        pairs = (codes[:-1] * CLASSES + codes[1:]).bincount()
        left, right = divmod(int(pairs.argmax()), CLASSES)
        is_pair = (codes[:-1] == left) & (codes[1:] == right)
        is_pair[1:] &= ~is_pair[:-1]  # of equal codes in a row
        codes[:-1][is_pair] = new
        codes = codes[~torch.cat((torch.tensor([False]), is_pair))]
    return codes


def batches(model: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        if model == "language model":
            codes = text()
            starts = torch.randint(len(codes) - CONTEXT, (16, 1), generator=generator)
            excerpts = codes[starts + torch.arange(CONTEXT + 1)]
            yield excerpts[:, :-1], excerpts[:, 1:]
        else:
            images, labels = digits()
            rows = torch.randint(1400, (64,), generator=generator)
            yield images[rows], labels[rows]


def run(situation: Situation, rule: str, seed: int) -> dict[str, float]:
    """Return the result of a run and how many steps were shortened."""
    torch.manual_seed(seed)
    model = MODELS[situation.model]()
    optimizer = OPTIMIZERS[situation.optimizer](model.parameters())
    rate = optimizer.param_groups[0]["lr"]
    guard = guarded(optimizer, model, rule)
    losses, touched = [], Counter()
    for step, (inputs, labels) in zip(range(STEPS), batches(situation.model, seed), strict=False):
        optimizer.param_groups[0]["lr"] = rate * FACTORS[situation.factor](step)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
        loss.backward()
        if situation.model == "language model":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        if guard is not None:
            touched[guard.last.status] += 1
    if situation.model == "language model":
        result = {"loss": statistics.fmean(losses[-LAST:])}
    else:
        images, labels = digits()
        with torch.no_grad():
            logits = model.eval()(images[1400:])
        accuracy = (logits.argmax(-1) == labels[1400:]).float().mean().item()
        result = {"accuracy": accuracy, "loss": float(cross_entropy(logits, labels[1400:]))}
    return {**result, "touched": touched["clipped"] + touched["skipped"]}


def guarded(optimizer: torch.optim.Optimizer, model: nn.Module, rule: str) -> SafeStep | None:
    make = RULES[rule]
    if make is None:
        return None
    guard = SafeStep(optimizer, model, estimator="jvp")
    controller, judge = guard._controller, make()
    controller._decrease = judge
    decide = controller.decide

    def told(measurement, learning_rate):
        judge.r = measurement.normalized_step
        return decide(measurement, learning_rate)

    controller.decide = told
    return guard


def table(results: dict[str, dict[str, float]], rules: list[str]) -> str:
    """Return mean results, half their range and steps touched, over the seeds that all rules have.

    Accuracy where there is one, then the loss; below, the mean rank of the loss, ties shared.
    """
    lines = ["| run | seeds | " + " | ".join(rules) + " |", "|---" * (len(rules) + 2) + "|"]
    ranks: list[list[float]] = []
    for situation in SITUATIONS:
        by_rule = [of_rule(results, situation, rule) for rule in rules]
        seeds = sorted(set.intersection(*map(set, by_rule)))
        if not seeds:
            continue
        found = [[seen[seed] for seed in seeds] for seen in by_rule]
        means = [statistics.fmean(each["loss"] for each in seen) for seen in found]
        ranks.append(
            [sum(m < mean for m in means) + sum(m == mean for m in means) / 2 + 0.5
             for mean in means]
        )  # fmt: skip
        lines.append(f"| {situation} | {len(seeds)} | {' | '.join(map(cell, found))} |")
    mean_ranks = [f"{statistics.fmean(of_one):.1f}" for of_one in zip(*ranks, strict=True)]
    lines.append("| mean rank of the loss | | " + " | ".join(mean_ranks) + " |")
    return "\n".join(lines)


def of_rule(
    results: dict[str, dict[str, float]], situation: Situation, rule: str
) -> dict[str, dict[str, float]]:
    start = f"{situation} | {rule} | "
    return {key[len(start) :]: each for key, each in results.items() if key.startswith(start)}


def cell(found: list[dict[str, float]]) -> str:
    losses = [each["loss"] for each in found]
    told = f"{statistics.fmean(losses):.3f} +- {(max(losses) - min(losses)) / 2:.3f}"
    if "accuracy" in found[0]:
        told = f"{statistics.fmean(each['accuracy'] for each in found):.3f} / {told}"
    return f"{told} ({statistics.fmean(each['touched'] for each in found):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="part of the name of a run")
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    end = time.monotonic() + 60 * options.minutes
    for seed in options.seeds:
        for situation in SITUATIONS:
            for rule in options.rules if options.only in str(situation) else ():
                key = f"{situation} | {rule} | {seed}"
                if key in results or time.monotonic() > end:
                    continue
                results[key] = run(situation, rule, seed)
                print(key, results[key], flush=True)
                options.json.write_text(json.dumps(results, indent=0))
    if options.table:
        print(table(results, options.rules))


if __name__ == "__main__":
    main()
