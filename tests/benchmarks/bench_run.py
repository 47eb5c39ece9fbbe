"""What a guard costs over a whole run at the learning rates that people choose.

Two copies of one model train on the same batches, the guarded one and the plain one, a step each in
turn, on one thread. Every step counts, the first measurements included; the ratio is that of the
sums of processor time, which other processes do not add to.

    python tests/benchmarks/bench_run.py --json run_cost.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from time import process_time
from typing import Any

import torch
from bench_step import GPT, Shape
from torch import Tensor
from torch.nn.functional import cross_entropy

from safestep import SafeStep

BATCH, LENGTH = 12, 64
SHAPE = Shape(BATCH, 128, 3, 256)
RATES = (1e-3, 4e-3)
RULES: dict[str, dict[str, Any]] = {
    "bound": {},
    "sufficient_decrease": {"sufficient_decrease": 0.5},
}


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of bytes of torch's own source text, and the bytes that follow."""
    folder = Path(torch.__file__).parent / "nn" / "modules"
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    data = torch.tensor(list(text))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(data) - LENGTH - 1, (steps, BATCH), generator=generator)
    windows = data[starts[..., None] + torch.arange(LENGTH + 1)]
    return [(each[:, :-1], each[:, 1:]) for each in windows]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a warm-up over a twelfth of the run, then a cosine."""
    begin = steps // 12
    if step < begin:
        return peak * (step + 1) / begin
    return peak * 0.5 * (1 + math.cos(math.pi * (step - begin) / (steps - begin)))


def trained(
    model: GPT, data: list[tuple[Tensor, Tensor]], peak: float, held: float = 1.0
) -> Callable[[int], float]:
    """Return a function that makes a training step and returns its seconds.

    From the middle of the run on, the rate is `held` times what it should be.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)

    def step(index: int) -> float:
        inputs, labels = data[index]
        begin = process_time()
        factor = held if 2 * index >= len(data) else 1.0
        optimizer.param_groups[0]["lr"] = factor * learning_rate(index, len(data), peak)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        step.loss = loss.item()  # type: ignore[attr-defined]
        return process_time() - begin

    step.optimizer = optimizer  # type: ignore[attr-defined]
    return step


def run(peak: float, steps: int, options: dict[str, Any], held: float = 1.0) -> dict[str, Any]:
    """Return the cost of one guarded run."""
    torch.manual_seed(0)
    plain_model, data = GPT(SHAPE), batches(steps)
    model = deepcopy(plain_model)
    plain, guarded = (trained(each, data, peak, held) for each in (plain_model, model))
    guard = SafeStep(guarded.optimizer, model, **options)  # type: ignore[attr-defined]
    pairs, reports = [], []
    for index in range(steps):
        pairs.append((plain(index), guarded(index)))
        reports.append(guard.last)
    without, with_guard = (sum(column) for column in zip(*pairs, strict=True))
    extra = defaultdict(list)
    for (one, two), report in zip(pairs, reports, strict=True):
        extra[report.estimator.split(" (")[0]].append((two - one) / (without / steps))
    return {
        "ratio": round(with_guard / without, 3), "ms": round(1e3 * without / steps, 1),
        "loss": [round(each.loss, 3) for each in (plain, guarded)],  # type: ignore[attr-defined]
        "steps": {name: len(each) for name, each in extra.items()},
        "extra": {name: round(statistics.mean(each), 2) for name, each in extra.items()},
        "clipped": sum(each.status == "clipped" for each in reports),
        "median_r": round(statistics.median(each.normalized_step for each in reports), 3),
    }  # fmt: skip


def main() -> None:
    """Print a line for each run, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--held", type=float, default=1.0, help="times the rate, from half way on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for rule in arguments.rules:
        for rate in arguments.rates:
            name = f"{rule}, {rate:g}" + (arguments.held != 1) * f", x{arguments.held:g} held"
            found[name] = line = run(rate, arguments.steps, RULES[rule], arguments.held)
            print(name, line, flush=True)
    if arguments.json is not None:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(known | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
