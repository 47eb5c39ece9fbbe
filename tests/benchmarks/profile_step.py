"""Where the time of a guarded step goes, as shares of the plain training step.

Every function of the guard that stands for a row of the table is timed, less the time of those that
it calls. Predicted and measured steps are told apart; medians are given.

    python tests/benchmarks/profile_step.py --model mlp
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from bench_step import SHAPES, WARM_UP, variant

from safestep.capture.recorder import Recorder
from safestep.guard.controller import StepController
from safestep.guard.health import Health
from safestep.guard.journal import Journal
from safestep.guard.predictor import Predictor
from safestep.guard.safe_step import SafeStep
from safestep.guard.snapshot import Snapshot, _Made
from safestep.measure.cross_check import CheckedEstimator

PARTS: dict[str, list[tuple[type, str]]] = {
    "record the forward call": [(Recorder, "_before"), (Recorder, "_after")],
    "look at the gradient of its output": [(Recorder, "_on_gradient")],
    "copy parameters and optimizer state": [(Snapshot, "take")],
    "norms of update, gradient and signals": [(_Made, "parts"), (Health, "of")],
    "predict": [(Predictor, "predict"), (Predictor, "learn")],
    "run again with tangents, reduce the rows": [(CheckedEstimator, "measure")],
    "decide, report, log": [(StepController, "decide"), (Journal, "publish")],
    "all else": [(SafeStep, "_before_step"), (SafeStep, "_after_step")],
}


class Stopwatch:
    """Seconds by part, without those of the parts that were called from it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time noted; what it returns too, if that is called later."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = perf_counter()
            self._inner.append(0.0)
            try:
                result = function(*args, **kwargs)
            finally:
                spent = perf_counter() - begin
                self.seconds[part] += spent - self._inner.pop()
                self._inner[-1] += spent
            return self.timed(part, result) if function.__name__ == "_on_gradient" else result

        return call


def profile(name: str, steps: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every part in predicted and in measured steps, and of plain ones."""
    watch = Stopwatch()
    for part, functions in PARTS.items():
        for owner, attribute in functions:
            function = vars(owner)[attribute]
            is_class = isinstance(function, classmethod)
            timed = watch.timed(part, function.__func__ if is_class else function)
            setattr(owner, attribute, classmethod(timed) if is_class else timed)
    shape, dtype = SHAPES[name], torch.float32
    variants = [variant(kind, name, shape, "cpu", dtype) for kind in ("plain", "auto", "jvp")]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index in range(steps + WARM_UP):
        for step in variants:
            watch.seconds.clear()
            begin = perf_counter()
            report = step()
            seconds = perf_counter() - begin
            if index < WARM_UP:
                continue
            row = found["plain"]
            if report is not None:
                row = found["predicted" if report.estimator == "predicted" else "measured"]
                for part in PARTS:
                    row[part].append(watch.seconds[part])
            row["step"].append(seconds)
    return found


def table(name: str, found: dict[str, dict[str, list[float]]]) -> str:
    """Return the medians as a Markdown table."""
    plain = statistics.median(found["plain"]["step"])
    lines = [
        f"| {name}: {1e3 * plain:.1f} ms a plain step | predicted | measured |",
        "|---|---|---|",
    ]
    rows = {part: [0.0, 0.0] for part in PARTS}
    for column, kind in enumerate(("predicted", "measured")):
        for part in PARTS:
            rows[part][column] = statistics.median(found[kind][part] or [0.0])
    rows["sum"] = [sum(row[column] for row in rows.values()) for column in (0, 1)]
    for part, row in rows.items():
        cells = " | ".join(f"{1e3 * seconds:.2f} ms, {seconds / plain:.1%}" for seconds in row)
        lines.append(f"| {part} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Profile what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="mlp")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    print(table(arguments.model, profile(arguments.model, arguments.steps)))
    print(f"CPU, torch {torch.__version__}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
