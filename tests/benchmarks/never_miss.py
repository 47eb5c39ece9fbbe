"""How often does estimator="auto" let a step through that an exact measurement would have scaled?

Every step that "auto" did not measure exactly, but predicted or let pass on a secant or on a part
of the batch, is measured here afterwards, by a whole-batch JVP along the update that was applied. A
miss is such a step with r over 1.25 times the limit.

    python tests/benchmarks/never_miss.py --steps 200000 --json never_miss.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_run import SHAPE
from bench_run import batches as run_batches
from bench_step import GPT
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep, logit_spread, logits_jvp

LIMIT = 1.0
RUN_STEPS = 800
Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """One causal self-attention head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.out(
            nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        )


class CharLM(nn.Module):
    """A two-layer causal character model."""

    def __init__(self, classes: int, width: int = 32, length: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(classes, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(nn.LayerNorm(width), Attention(width)),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width),
                        nn.GELU(),
                        nn.Linear(4 * width, width),
                    ),
                ]
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position
        for attention, mlp in self.blocks:
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x)


@dataclass
class Task:
    """A model, its data and a learning rate that trains it."""

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[random.Random], Iterator[Batch]]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    clip: float | None = None


@dataclass
class Tally:
    """Counts of one task in one scenario."""

    task: str
    scenario: str
    steps: int = 0
    predicted: int = 0
    secants: int = 0
    sampled: int = 0
    misses: int = 0
    over_four: int = 0
    largest: float = 0.0
    usual: float = 0.0  # median r of all steps


def digits_batches(image: bool) -> Callable[[random.Random], Iterator[Batch]]:
    """Return a loader of batches of 64 digits."""
    data, target = load_digits(return_X_y=True)
    inputs = torch.tensor(data / 16, dtype=torch.float32)
    inputs = inputs.view(-1, 1, 8, 8) if image else inputs
    labels = torch.tensor(target)

    def batches(rng: random.Random) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        while True:
            rows = torch.randint(len(inputs), (64,), generator=generator)
            yield inputs[rows], labels[rows]

    return batches


def text_batches(rng: random.Random) -> Iterator[Batch]:
    """Yield windows of the source text of this machine's ``random`` module, as character codes."""
    codes = torch.tensor([min(ord(c), 127) for c in Path(random.__file__).read_text()])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    while True:
        starts = torch.randint(len(codes) - 33, (8, 1), generator=generator)
        window = codes[starts + torch.arange(33)]
        yield window[:, :-1], window[:, 1:]


def tasks() -> list[Task]:
    """Return the models: normalised and not, with batch statistics, and a language model."""
    adam, sgd, adamw = torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW
    return [
        Task("MLP+LayerNorm, Adam", lambda: nn.Sequential(
            nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)),
            digits_batches(False), adam, 1e-3),
        Task("MLP, SGD momentum", lambda: nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
            digits_batches(False), lambda p, lr: sgd(p, lr=lr, momentum=0.9), 0.03),
        Task("CNN+BatchNorm, Adam", lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 10)), digits_batches(True), adam, 1e-3),
        Task("character LM, AdamW, clip 1", lambda: CharLM(128), text_batches, adamw, 1e-3, 1.0),
    ]  # fmt: skip


def gpt_tasks() -> list[Task]:
    """Return the GPT of ``bench_run.py``; "cosine" peaks at its best rate and at twice that."""
    return [
        Task(f"GPT, AdamW, peak {4 * lr:g}", lambda: GPT(SHAPE), gpt_batches, torch.optim.AdamW, lr)
        for lr in (1e-3, 2e-3)
    ]


def gpt_batches(rng: random.Random) -> Iterator[Batch]:
    """Yield the batches of ``bench_run.py``."""
    return iter(run_batches(RUN_STEPS))


def healthy(step: int, rng: random.Random, model: nn.Module) -> float:
    """Return the factor on the learning rate: one."""
    return 1.0


def hot(step: int, rng: random.Random, model: nn.Module) -> float:
    """Return ten: the learning rate is wrong from the first step on."""
    return 10.0


def cosine(step: int, rng: random.Random, model: nn.Module) -> float:
    """Return warm-up and cosine decay from four times the learning rate."""
    progress = step / RUN_STEPS
    return 4.0 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))


def warm_restart(step: int, rng: random.Random, model: nn.Module) -> float:
    """Return cosine decay that starts again every 100 steps."""
    return 4.0 * 0.5 * (1 + math.cos(math.pi * (step % 100) / 100))


def single_spike(step: int, rng: random.Random, model: nn.Module) -> float:
    """Return 3 to 10,000 for a single step, in one of 50."""
    return 10 ** rng.uniform(0.5, 4) if rng.random() < 0.02 else 1.0


def held_spike(step: int, rng: random.Random, model: nn.Module) -> float:
    """Return 3 to 10,000, for the third quarter of the run."""
    if step == 0:
        model.spike = 10 ** rng.uniform(0.5, 4)
    return model.spike if RUN_STEPS // 2 <= step < 3 * RUN_STEPS // 4 else 1.0


def frozen_head(step: int, rng: random.Random, model: nn.Module) -> float:
    """Return one; the last layer is frozen and thawed every 100 steps."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    head.requires_grad_((step // 100) % 2 == 0)
    return 1.0


def poison(batch: Batch, rng: random.Random) -> Batch:
    """Return the batch with wrong labels, or with inputs far out of range."""
    inputs, labels = batch
    if inputs.is_floating_point() and rng.random() < 0.5:
        return inputs * 10 ** rng.uniform(0.5, 2), labels
    return inputs, labels.flatten()[torch.randperm(labels.numel())].view_as(labels)


SCENARIOS = {
    "healthy": healthy, "hot": hot, "cosine": cosine, "warm restart": warm_restart,
    "single spikes": single_spike, "held spike": held_spike, "poisoned batch": healthy,
    "frozen head": frozen_head,
}  # fmt: skip


def run(task: Task, scenario: str, seed: int, *, is_told: bool = False) -> Tally:
    """Train once under "auto" and count what it let through; with `is_told`, of recorded steps."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = task.make()
    optimizer = task.optimizer(model.parameters(), lr=task.lr)
    guard = SafeStep(optimizer, model, estimator="auto")
    twin = deepcopy(model)
    tally = Tally(task.name, scenario)
    seen = []
    for step, batch in zip(range(RUN_STEPS), task.batches(rng), strict=False):
        if scenario == "poisoned batch" and rng.random() < 0.02:
            batch = poison(batch, rng)
        factor = SCENARIOS[scenario](step, rng, model)
        optimizer.param_groups[0]["lr"] = task.lr * factor
        optimizer.zero_grad()
        if is_told:
            guard.record(training_loss, model, *batch)
        training_loss(model, *batch).backward()
        if task.clip:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer.step()
        tally.steps += 1
        seen.append(guard.last.normalized_step)
        estimator = guard.last.estimator.split(" ")[0]
        if estimator in ("predicted", "secant", "sampled"):
            seen[-1] = exact_r(model, twin, before, batch[0])
            audit(tally, estimator, seen[-1])
    guard.detach()
    tally.usual = statistics.median(r for r in seen if not math.isnan(r))  # of a skipped step
    return tally


def training_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return what is minimised."""
    return cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


def exact_r(model: nn.Module, twin: nn.Module, before: dict[str, Tensor], inputs: Tensor) -> float:
    """Return r of the update that was applied, by a JVP of a twin left at its starting point."""
    update = {name: param.detach() - before[name] for name, param in model.named_parameters()}
    twin.load_state_dict(before, strict=False)
    _, tangent = logits_jvp(twin, update, inputs)
    return logit_spread(tangent).max().item() / math.pi


def audit(tally: Tally, estimator: str, r: float) -> None:
    """Count a step that was let through."""
    tally.predicted += estimator == "predicted"
    tally.secants += estimator == "secant"
    tally.sampled += estimator == "sampled"
    tally.misses += r > 1.25 * LIMIT
    tally.over_four += r > 4 * LIMIT
    tally.largest = max(tally.largest, r)


def table(tallies: list[Tally]) -> str:
    """Return the counts as a Markdown table, added up over seeds."""
    lines = [
        "| task | scenario | median r | steps | predicted | secant | sampled | misses "
        "| r > 4 x limit | largest r let through |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((tally.task, tally.scenario) for tally in tallies)
    groups = [[t for t in tallies if (t.task, t.scenario) == key] for key in keys]
    for group in [*groups, tallies]:
        total = Tally("all" if group is tallies else group[0].task, group[0].scenario)
        total.usual = statistics.median(tally.usual for tally in group)
        for tally in group:
            total.steps += tally.steps
            total.predicted += tally.predicted
            total.secants += tally.secants
            total.sampled += tally.sampled
            total.misses += tally.misses
            total.over_four += tally.over_four
            total.largest = max(total.largest, tally.largest)
        scenario = "all" if group is tallies else total.scenario
        lines.append(
            f"| {total.task} | {scenario} | {total.usual:.2g} | {total.steps} | "
            f"{total.predicted / total.steps:.1%} | {total.secants / total.steps:.1%} | "
            f"{total.sampled / total.steps:.1%} | {total.misses} | {total.over_four} | "
            f"{total.largest:.2f} |"
        )
    return "\n".join(lines)


def write(tallies: list[Tally], path: Path | None) -> None:
    """Write the counts so far, if they are wanted."""
    if path is not None:
        path.write_text(json.dumps([asdict(tally) for tally in tallies], indent=1))


def main() -> None:
    """Run tasks and scenarios in turn until enough steps are done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000, help="guarded steps in all")
    parser.add_argument(
        "--told", action="store_true", help="record training steps, as the Lightning callback does"
    )
    parser.add_argument(
        "--gpt",
        action="store_true",
        help="the GPT at its best rate and twice it instead, one run each",
    )
    parser.add_argument("--json", type=Path, default=None, help="write the counts here")
    arguments = parser.parse_args()
    tallies: list[Tally] = []
    if arguments.gpt:
        tallies = [run(task, "cosine", 0) for task in gpt_tasks()]
        arguments.steps = 0
    seed = 0
    while sum(tally.steps for tally in tallies) < arguments.steps:
        for task in tasks():
            tallies += [run(task, scenario, seed, is_told=arguments.told) for scenario in SCENARIOS]
        seed += 1
        write(tallies, arguments.json)
    write(tallies, arguments.json)
    print(table(tallies))


if __name__ == "__main__":
    main()
