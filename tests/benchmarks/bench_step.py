"""What a guarded step costs: time and memory as multiples of the plain training step.

Every variant trains its own copy of the model; the steps of all of them are interleaved in one
process, so that whatever else the machine does hits all alike. Memory is measured in a process of
its own for each variant, as the peak. What is timed is healthy training on real data: r stays well
under the limit, and "auto" measures now and then; what it costs where r is larger, see ``--lr``.

    python tests/benchmarks/bench_step.py --model mlp gpt resnet18 --json cost.json

The peers ZClip and StableAdamW are timed where the packages zclip and torch-optimi are installed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import random
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from safestep import SafeStep, StepReport
from safestep.guard.predictor import FIRST_STEPS

GUARDS = {
    "plain": "nothing",
    "clip_grad_norm_": "gradient norm",
    "ZClip": "gradient norm, against its running mean",
    "StableAdamW": "update over gradient, per tensor",
    "auto": "every step, by prediction, JVP where in doubt",
    "auto, no copy": "every step, by prediction, JVP where in doubt",
    "jvp": "every step, exactly",
    "jvp, no copy": "every step, exactly",
    "secant": "every step, near r = 1",
    "difference": "every step, to a few percent",
}
BATCHES = 16  # in turn: of one alone r would vanish as soon as it is learnt
LR = {"mlp": 1e-3, "gpt": 1e-4, "resnet18": 3e-5}


@dataclass
class Shape:
    """Sizes of a benchmark model."""

    batch: int
    width: int
    depth: int
    vocabulary: int


SHAPES = {
    "mlp": Shape(1438, 128, 2, 10),
    "gpt": Shape(16, 256, 4, 256),
    "resnet18": Shape(128, 64, 4, 10),
}


class Block(nn.Module):
    """A pre-norm Transformer block with causal attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.movedim(-3, 0).transpose(-2, -3)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(-2, -3).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """A decoder-only language model, up to 128 tokens long."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Parameter(0.02 * torch.randn(128, shape.width))
        self.blocks = nn.Sequential(*(Block(shape.width) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(
            self.norm(self.blocks(self.token(tokens) + self.position[: tokens.shape[1]]))
        )


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(shape: Shape) -> nn.Module:
    """Return ResNet-18 in the shape used on CIFAR."""
    widths = [shape.width * 2**stage for stage in range(shape.depth)]
    stem = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    stages = [
        layer
        for before, width in zip([widths[0], *widths], widths, strict=False)
        for layer in (
            Residual(before, width, 1 if width == widths[0] else 2),
            Residual(width, width, 1),
        )
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], shape.vocabulary)]
    return nn.Sequential(*stem, *stages, *head)


def mlp(shape: Shape) -> nn.Module:
    """Return an MLP with LayerNorm for the digits."""
    layers: list[nn.Module] = []
    for inputs in [64, *[shape.width] * (shape.depth - 1)]:
        layers += [nn.Linear(inputs, shape.width), nn.LayerNorm(shape.width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(shape.width, shape.vocabulary))


def data(name: str, shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return one batch: characters of a text, or digits; those for a CNN are enlarged."""
    generator = torch.Generator().manual_seed(seed)
    if name == "gpt":
        codes = _text()
        starts = torch.randint(len(codes) - 129, (shape.batch, 1), generator=generator)
        tokens = codes[starts + torch.arange(129)]
        return tokens[:, :-1], tokens[:, 1:].flatten()
    inputs, targets = _digits()
    rows = torch.randperm(len(inputs), generator=generator)[: shape.batch]
    if name == "resnet18":
        images = interpolate(inputs[rows].view(-1, 1, 8, 8), scale_factor=4)
        return images.repeat(1, 3, 1, 1), targets[rows]
    return inputs[rows], targets[rows]


@cache
def _text() -> Tensor:
    """Return the source text of this machine's ``random`` module, as character codes."""
    return torch.tensor([min(ord(c), 127) for c in Path(random.__file__).read_text()])


@cache
def _digits() -> tuple[Tensor, Tensor]:
    pixels, digits = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)


def variant(
    kind: str,
    name: str,
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    lr: float | None = None,
) -> Callable[[], StepReport | None]:
    """Return a function that makes one training step of a variant and returns its report."""
    torch.manual_seed(0)
    model = wrap({"mlp": mlp, "gpt": GPT, "resnet18": resnet18}[name](shape).to(device))
    optimizer_class = _stable_adamw() if kind == "StableAdamW" else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=lr or LR[name])
    batches = cycle(
        [[tensor.to(device) for tensor in data(name, shape, seed)] for seed in range(BATCHES)]
    )
    estimator, _, suffix = kind.partition(", ")
    zclip = _zclip() if kind == "ZClip" else None
    guard = None
    if estimator in _ESTIMATORS:
        guard = SafeStep(optimizer, model, estimator=estimator, copy=suffix != "no copy")

    def step() -> StepReport | None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = cross_entropy(model(inputs).flatten(0, -2), targets)
        loss.backward()
        if kind == "clip_grad_norm_":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if zclip is not None:
            zclip.step(model)
        optimizer.step()
        return None if guard is None else guard.last

    return step


_ESTIMATORS = ("auto", "jvp", "secant", "difference")


def _stable_adamw() -> type[torch.optim.Optimizer]:
    from optimi import StableAdamW

    return StableAdamW


def _zclip() -> Any:
    from zclip import ZClip

    return ZClip()


def time_steps(
    kinds: list[str],
    name: str,
    shape: Shape,
    steps: int,
    device: str,
    dtype: torch.dtype,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    lr: float | None = None,
    reports: dict[str, list[StepReport | None]] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of every step of every variant, interleaved; collect their `reports`."""
    variants = {kind: variant(kind, name, shape, device, dtype, wrap, lr) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(steps + WARM_UP):
        for kind, step in variants.items():
            begin = perf_counter()
            report = step()
            if device == "cuda":
                torch.cuda.synchronize()
            if index >= WARM_UP:
                seconds[kind].append(perf_counter() - begin)
                if reports is not None:
                    reports.setdefault(kind, []).append(report)
    return seconds


WARM_UP = FIRST_STEPS + 4  # the first steps are all measured, three of them by two estimators
MEMORY_STEPS = 6  # all of them measured; until then plain training has found its peak too


def peak_memory(kind: str, name: str, shape: Shape, device: str, dtype: torch.dtype) -> float:
    """Return the peak memory of a few steps of a variant in a process of its own, in MiB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory_here, (kind, name, shape, device, dtype))


def _peak_memory_here(kind: str, name: str, shape: Shape, device: str, dtype: torch.dtype) -> float:
    # What a process loads once, some 20 MiB, is no part of a step: torch's forward mode above all.
    for step in (variant("jvp", "mlp", Shape(8, 8, 2, 10), device, dtype),
                 variant(kind, name, shape, device, dtype)):  # fmt: skip
        for _ in range(MEMORY_STEPS):
            step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident()


def peak_resident() -> float:
    """Return this process's peak resident size in MiB, on Linux; nan elsewhere."""
    # Not getrusage: what it says of a spawned process is at least the size of its parent.
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(line) / 2**10


def measure(
    kinds: list[str],
    name: str,
    shape: Shape,
    steps: int,
    device: str,
    dtype: torch.dtype,
    lr: float | None,
) -> Iterator[dict[str, object]]:
    """Yield one record for each variant of a model."""
    reports: dict[str, list[StepReport | None]] = {}
    seconds = time_steps(kinds, name, shape, steps, device, dtype, lr=lr, reports=reports)
    plain_memory = peak_memory("plain", name, shape, device, dtype)
    for kind in kinds:
        memory = peak_memory(kind, name, shape, device, dtype)
        yield {
            "model": name, "variant": kind, "guards": GUARDS[kind], "shape": vars(shape),
            "device": _device_name(device), "dtype": str(dtype), "steps": steps,
            "mean_ratio": statistics.mean(seconds[kind]) / statistics.mean(seconds["plain"]),
            "median_ratio": statistics.median(seconds[kind]) / statistics.median(seconds["plain"]),
            "plain_ms": 1e3 * statistics.median(seconds["plain"]),
            "memory_ratio": memory / plain_memory, "learning_rate": lr or LR[name],
            **_looked(list(filter(None, reports[kind]))),
        }  # fmt: skip


def _looked(reports: list[StepReport]) -> dict[str, float]:
    """Return the usual r and the share of steps that were measured; nothing without a guard."""
    if not reports:
        return {}
    measured = [report.estimator != "predicted" for report in reports]
    r = statistics.median(report.normalized_step for report in reports)
    return {"normalized_step": r, "measured_share": statistics.mean(measured)}


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def table(records: list[dict]) -> str:
    """Return the records as a Markdown table."""
    lines = [
        "| model | variant | mean time | median time | peak memory | r | measured | guards |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        shape = record["shape"]
        size = f"batch {shape['batch']}, width {shape['width']}, depth {shape['depth']}"
        size += f", {shape['vocabulary']} classes"
        lines.append(
            f"| {record['model']} ({size}) | {record['variant']} | {record['mean_ratio']:.2f} | "
            f"{record['median_ratio']:.2f} | {record['memory_ratio']:.2f} | {_seen(record)} | "
            f"{record['guards']} |"
        )
    where = f"{records[0]['device']}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return "\n".join([*lines, "", f"Multiples of the plain step. {where}."])


def _seen(record: dict) -> str:
    if "normalized_step" not in record:
        return " | "
    return f"{record['normalized_step']:.2g} | {record['measured_share']:.1%}"


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["mlp", "gpt"])
    peers = {"ZClip": "zclip", "StableAdamW": "optimi"}
    kinds = [kind for kind in GUARDS if kind not in peers or find_spec(peers[kind])]
    parser.add_argument("--variant", nargs="+", choices=list(GUARDS), default=kinds)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kinds = ["plain", *(kind for kind in arguments.variant if kind != "plain")]
    dtype = getattr(torch, arguments.dtype)
    records = []
    for name in arguments.model:
        shape = SHAPES[name]
        records += measure(
            kinds, name, shape, arguments.steps, arguments.device, dtype, arguments.lr
        )
    print(table(records))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
