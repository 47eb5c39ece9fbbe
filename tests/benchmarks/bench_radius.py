"""Time the ladder of radii: a settled batch against one pass over the tangent, and each rung.

Run: python tests/benchmarks/bench_radius.py [ROWS CLASSES]. Times are medians of interleaved runs,
so that a slow moment of the machine falls on all alike; the ratios are what to look at.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from safestep.radius.bounds import certified_radius, closed_form_radius, ladder_radius, radius_bound

REPEATS = 15


def interleaved_medians(
    subjects: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    seconds = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, run in subjects.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(title: str, medians: dict[str, float]) -> None:
    unit = next(iter(medians.values()))
    print(title)
    for name, seconds in medians.items():
        print(f"  {name:42} {1e3 * seconds:9.2f} ms {seconds / unit:9.2f} x")


def main(num_rows: int = 4096, num_classes: int = 32000) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_rows, num_classes, generator=generator)
    tangent = 0.1 * torch.randn(num_rows, num_classes, generator=generator)
    few_over = tangent.clone()
    few_over[:: max(1, num_rows // 16)] *= 100
    subjects = {
        "one aminmax over the tangent": lambda: tangent.aminmax(dim=-1),
        "radius_bound": lambda: radius_bound(tangent),
        "ladder_radius, all settled": lambda: ladder_radius(logits, tangent, limit=1.0),
        "ladder_radius, 16 rows over the limit": lambda: ladder_radius(logits, few_over, limit=1.0),
    }
    report(f"{num_rows} x {num_classes}", interleaved_medians(subjects, REPEATS))
    logits, tangent = logits[:256], tangent[:256]
    subjects = {
        "one aminmax over the tangent": lambda: tangent.aminmax(dim=-1),
        "one softmax": lambda: logits.softmax(dim=-1),
        "closed_form_radius": lambda: closed_form_radius(logits, tangent),
        "certified_radius": lambda: certified_radius(logits, tangent),
    }
    report(f"{len(logits)} x {num_classes}", interleaved_medians(subjects, 3))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
