"""Radii of a linear_cross_entropy over a large vocabulary: extra memory and time.

    python tests/benchmarks/bench_vocabulary.py [--rows 4096] [--classes 128000] [--features 64]

The logits and their tangent take three products of hidden states and weights. The time is given
as a multiple of three plain products (in tiles of 256 rows, interleaved). The loss that runs again
before the first tile is there is not counted, and neither is the tangent of that tile. Memory is
what the first two measurements add to the peak resident size of a process of its own that has made
two training steps, forward and backward, before; weights, gradients and update are there already.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from time import perf_counter

import torch
from bench_step import peak_resident
from torch import Tensor, nn
from torch.nn import functional

from safestep.capture.call import Call
from safestep.capture.finder import LogitFinder
from safestep.capture.random_state import CallConditions
from safestep.measure.estimators import jvp
from safestep.radius.batch import LogitTangent, smallest_row
from safestep.radius.bounds import RungOption

# (label, rung, spread of the tangent in units of pi: over 1, every row climbs the whole ladder)
CASES = (("bound", "bound", 0.5), ("certified, r < 1", "certified", 0.5),
         ("certified, every row over the limit", "certified", 4.0))  # fmt: skip


class Head(nn.Module):
    """The last layer of a language model, on hidden states that are parameters too."""

    def __init__(self, rows: int, classes: int, features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Parameter(torch.randn(rows, features, generator=generator))
        self.weight = nn.Parameter(torch.randn(classes, features, generator=generator))

    def forward(self, target: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions()
        return functional.linear_cross_entropy(self.hidden, self.weight, target, options=options)


def radius(head: Head, update: list[Tensor], rung: RungOption, finder: LogitFinder) -> float:
    """Find the smallest radius of the head's rows, as a guarded step does; return the seconds."""
    target = torch.zeros(len(head.hidden), dtype=torch.int64)
    calls = [Call.of(lambda: head(target), (), {}, CallConditions(head))]
    rows = jvp(calls, head, list(head.parameters()), update, finder)
    first = [next(rows)]  # a list lets go of it
    return seconds(lambda: smallest_row(chain(emptied(first), rows), rung=rung, limit=1.0))


def emptied(held: list[LogitTangent]) -> Iterator[LogitTangent]:
    """Yield what a list holds, and take it out."""
    while held:
        yield held.pop()


def products(head: Head) -> None:
    """Multiply hidden states and weights, a tile at a time."""
    with torch.no_grad():
        for tile in head.hidden.split(256):
            functional.linear(tile, head.weight)


def case(sizes: tuple[int, int, int], rung: RungOption, spread: float) -> tuple[Head, list[Tensor]]:
    """Return a head and an update that moves its logits by about so much."""
    head = Head(*sizes)
    scale = spread * torch.pi / (12 * sizes[2] ** 0.5)
    return head, [scale * torch.randn_like(param) for param in head.parameters()]


def seconds(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    begin = perf_counter()
    run()
    return perf_counter() - begin


def extra_memory(
    sizes: tuple[int, int, int], rung: RungOption, spread: float, queue: object
) -> None:
    """Put the growth of the peak resident size over a training step's, in MiB, into the queue."""
    torch.set_num_threads(1)
    head, update = case(sizes, rung, spread)
    small, few = case((64, 100, sizes[2]), rung, spread)
    radius(small, few, rung, LogitFinder())  # loads what is loaded once
    for _ in range(6):  # what training holds: where the heap has a hole, one step holds less
        head(torch.zeros(sizes[0], dtype=torch.int64)).backward()
    before = peak_resident()
    finder = LogitFinder()
    for _ in range(2):
        radius(head, update, rung, finder)
    queue.put(peak_resident() - before)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=128_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sizes = (options.rows, options.classes, options.features)
    torch.set_num_threads(1)
    for label, rung, spread in CASES:
        head, update = case(sizes, rung, spread)
        finder = LogitFinder()
        radius(head, update, rung, finder)  # the first step also finds out which logits there are
        times = [
            (seconds(partial(products, head)), radius(head, update, rung, finder))
            for _ in range(options.repeats)
        ]
        plain, ours = (statistics.median(column) for column in zip(*times, strict=True))
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=extra_memory, args=(sizes, rung, spread, queue))
        process.start()
        print(
            f"{label:36} {ours / (3 * plain):5.2f} x three products, {queue.get():6.1f} MiB extra"
        )
        process.join()


if __name__ == "__main__":
    main()
