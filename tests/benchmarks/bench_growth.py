"""How the cost of a guarded step grows: a table, and a figure, for each size of the GPT.

    python tests/benchmarks/bench_growth.py --axis batch width depth vocabulary ranks --figure g.png

Guarded and plain steps are interleaved, as in bench_step.py. Ranks are gloo processes, each with a
batch of its own on one thread: under DDP ("ranks"), or with sharded parameters ("shards", FSDP2).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from bench_step import Block, Shape, time_steps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).parents[1] / "processes"))
from launch import run

AXES = ("batch", "width", "depth", "vocabulary", "ranks", "shards")
KINDS = ["plain", "auto", "jvp"]
FACTORS = (0.25, 0.5, 1, 2)
RANKS = (1, 2, 4)
# Sizes that a few hundred steps take minutes of, not hours.
BASE = Shape(batch=8, width=128, depth=4, vocabulary=2048)

Point = dict[str, float]  # size on the axis, milliseconds of a plain step, and ratios


def point(size: int, seconds: dict[str, list[float]]) -> Point:
    """Return mean ratios to the plain step."""
    means = {kind: statistics.mean(times) for kind, times in seconds.items()}
    ratios = {kind: means[kind] / means["plain"] for kind in KINDS[1:]}
    return {"size": size, "plain_ms": 1e3 * means["plain"], **ratios}


def grown(axis: str, steps: int) -> list[Point]:
    """Return a point for each size of the model along an axis."""
    points = []
    for factor in FACTORS:
        sizes = vars(BASE) | {axis: int(getattr(BASE, axis) * factor)}
        seconds = time_steps(KINDS, "gpt", Shape(**sizes), steps, "cpu", torch.float32)
        points.append(point(sizes[axis], seconds))
    return points


def on_ranks(steps: int, axis: str) -> list[Point]:
    """Return a point for each number of ranks, which hold all parameters or a shard of each."""
    points = []
    for ranks in RANKS:
        output = Path(tempfile.mkdtemp(), "point.json")
        run(_on_rank, ranks, steps, axis, output, timeout=900)
        points.append(json.loads(output.read_text()))
    return points


def _on_rank(rank: int, steps: int, axis: str, output: Path) -> None:
    wrap = WRAPPERS[axis]
    seconds = time_steps(KINDS, "gpt", BASE, steps, "cpu", torch.float32, wrap=wrap)
    if rank == 0:
        output.write_text(json.dumps(point(dist.get_world_size(), seconds)))


def _sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in filter(lambda module: isinstance(module, Block), model.modules()):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"ranks": DistributedDataParallel, "shards": _sharded}


def draw(growth: dict[str, list[Point]], path: Path) -> None:
    """Save a figure of every axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(growth), 2.6), layout="constrained")
    panels = figure.subplots(1, len(growth), sharey=True, squeeze=False)[0]
    for panel, (axis, points) in zip(panels, growth.items(), strict=True):
        sizes = [found["size"] for found in points]
        for kind in KINDS[1:]:
            panel.plot(sizes, [found[kind] for found in points], marker="o", label=kind)
        panel.axhline(1, color="0.6", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel(axis)
    panels[0].set_ylabel("time / plain step")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure the axes asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    growth = {}
    # Ranks first: processes are forked, which must happen before the first backward.
    for axis in sorted(arguments.axis, key=lambda axis: axis not in WRAPPERS):
        growth[axis] = (
            on_ranks(arguments.steps, axis) if axis in WRAPPERS else grown(axis, arguments.steps)
        )
        print(f"\n| {axis} | plain, ms | auto | jvp |\n|---|---|---|---|")
        for found in growth[axis]:
            print("| {size:.0f} | {plain_ms:.1f} | {auto:.2f} | {jvp:.2f} |".format(**found))
    print(f"\nGPT, {vars(BASE)}, CPU, {torch.get_num_threads()} threads.", flush=True)
    if arguments.figure is not None:
        draw(growth, arguments.figure)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(growth, indent=1))


if __name__ == "__main__":
    main()
