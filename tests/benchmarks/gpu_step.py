"""What a guarded step costs on a GPU: a GPT of 100 million parameters, bf16, compiled and not.

Every variant trains its own copy of the model on words of source text. Each first makes the steps
of a warm-up alone, in which peak memory and what the host reads from the device are looked at. Then
the steps of all of them are timed in turn in one process, the device waited for after each; and
then in blocks of steps that nothing waits for, as a training loop runs. Without a GPU a tiny model
shows that the script works.

A measured step in which two estimators differed, so that both ran, is marked "c" in the table.

    python tests/benchmarks/gpu_step.py --json gpu.json --markdown gpu.md
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import platform
import re
import statistics
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path
from time import perf_counter
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep, StepReport

VARIANTS: dict[str, dict[str, object] | None] = {
    "plain": None,
    "auto": {"estimator": "auto"},
    "jvp": {"estimator": "jvp"},
    "auto, no copy": {"estimator": "auto", "copy": False},
    "jvp, no copy": {"estimator": "jvp", "copy": False},
}
BATCHES = 16
ALONE = 32  # steps of each variant before the timing, the first 16 of which "auto" measures
WARM_UP = 20  # steps in which the learning rate rises
SETTLED = 6  # of those: by then all is compiled, and estimators are no longer compared
BLOCK = 10  # steps that nothing waits for
MODULES = ("argparse", "inspect", "tarfile", "typing", "ast", "datetime", "decimal", "doctest",
           "subprocess", "threading", "pickle", "zipfile")  # fmt: skip


@dataclass
class Shape:
    """Sizes of the model, its batch and the run."""

    batch: int
    length: int
    width: int
    depth: int
    vocabulary: int
    steps: int
    seconds: float  # at most, for the timing in turn; half of it for the blocks


SHAPES = {
    "100m": Shape(8, 1024, 768, 12, 8192, 300, 40.0),
    "tiny": Shape(2, 32, 64, 2, 512, 8, 4.0),
}


class Block(nn.Module):
    """A pre-norm Transformer block with causal attention, heads of 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
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
    """A decoder-only language model, initialised as GPT-2 is."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Parameter(0.02 * torch.randn(shape.length, shape.width))
        self.blocks = nn.Sequential(*(Block(shape.width) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position)))


@cache
def text(vocabulary: int) -> Tensor:
    """Return the source text of some standard modules as codes of its most frequent words."""
    source = "".join(inspect.getsource(__import__(name)) for name in MODULES)
    words = re.findall(r"\w+|\s+|[^\w\s]", source)
    common = [word for word, _ in Counter(words).most_common(vocabulary - 1)]
    codes = {word: code for code, word in enumerate(common, start=1)}
    return torch.tensor([codes.get(word, 0) for word in words])


def data(shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """Return one batch of inputs and the words that come next."""
    generator = torch.Generator().manual_seed(seed)
    codes = text(shape.vocabulary)
    starts = torch.randint(len(codes) - shape.length - 1, (shape.batch, 1), generator=generator)
    tokens = codes[starts + torch.arange(shape.length + 1)]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


def variant(
    kind: str, shape: Shape, device: str, compiled: bool, lr: float
) -> Callable[[], StepReport | None]:
    """Return a function that makes one training step of a variant and returns its report."""
    torch.manual_seed(0)
    model = GPT(shape).to(device)
    called = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    batches = cycle(
        [[tensor.to(device) for tensor in data(shape, seed)] for seed in range(BATCHES)]
    )
    options = VARIANTS[kind]
    guard = None if options is None else SafeStep(optimizer, called, **options)  # type: ignore[arg-type]
    warm_up = iter(range(1, WARM_UP + 1))

    def step() -> StepReport | None:
        inputs, targets = next(batches)
        optimizer.param_groups[0]["lr"] = lr * next(warm_up, WARM_UP) / WARM_UP
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = cross_entropy(called(inputs).flatten(0, -2), targets)
        loss.backward()
        optimizer.step()
        return None if guard is None else guard.last

    return step


@dataclass
class Seen:
    """What a variant's steps alone have shown, by "predicted", "measured" and "compared"."""

    peaks: dict[str, float] = field(default_factory=dict)  # bytes over what others hold
    reads: dict[str, list[int]] = field(default_factory=dict)
    places: dict[str, Counter[str]] = field(default_factory=dict)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def run_alone(step: Callable[[], StepReport | None], others: int, device: str) -> Seen:
    """Make the first steps of a variant, and note the peak and the host's reads of each."""
    seen = Seen()
    for index in range(ALONE):
        synchronize(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        report, places = _with_reads(step, device)
        synchronize(device)
        if index < SETTLED:
            continue
        regime = _regime(report)
        if device == "cuda":
            peak = float(torch.cuda.max_memory_allocated() - others)
            seen.peaks[regime] = max(seen.peaks.get(regime, 0.0), peak)
        seen.reads.setdefault(regime, []).append(len(places))
        seen.places.setdefault(regime, Counter()).update(places)
    return seen


def _with_reads(
    step: Callable[[], StepReport | None], device: str
) -> tuple[StepReport | None, list[str]]:
    """Return a step's report and the places in which the host waited for the device."""
    if device != "cuda":
        return step(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            report = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        "/".join(Path(each.filename).parts[-2:]) + f":{each.lineno}"
        for each in caught
        if "called a synchronizing" in str(each.message)
    ]
    for each in caught:
        if "ynchroniz" not in str(each.message):
            print(f"  warned: {str(each.message)[:300]} ({each.filename}:{each.lineno})")
    return report, places


def _regime(report: StepReport | None) -> str:
    if report is None:
        return "plain"
    if "(" in report.estimator:  # by two estimators, which differed
        return "compared"
    return "predicted" if report.estimator == "predicted" else "measured"


def time_in_turn(
    steps: dict[str, Callable[[], StepReport | None]], shape: Shape, device: str
) -> tuple[dict[str, list[float]], dict[str, list[StepReport]]]:
    """Return the milliseconds and the reports of every step of every variant, interleaved."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    reports: dict[str, list[StepReport]] = {kind: [] for kind in steps}
    end = perf_counter() + shape.seconds
    for _ in range(shape.steps):
        for kind, step in steps.items():
            synchronize(device)
            begin = perf_counter()
            report = step()
            synchronize(device)
            times[kind].append(1e3 * (perf_counter() - begin))
            if report is not None:
                reports[kind].append(report)
        if perf_counter() > end:
            break
    return times, reports


def time_in_blocks(
    steps: dict[str, Callable[[], StepReport | None]], shape: Shape, device: str
) -> tuple[dict[str, list[float]], dict[str, list[StepReport]]]:
    """Return the milliseconds a step takes, by block of steps that run without waiting."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    reports: dict[str, list[StepReport]] = {kind: [] for kind in steps}
    end = perf_counter() + shape.seconds / 2
    while perf_counter() < end or not times["plain"]:
        for kind, step in steps.items():
            synchronize(device)
            begin = perf_counter()
            made = [step() for _ in range(BLOCK)]
            synchronize(device)
            times[kind].append(1e3 * (perf_counter() - begin) / BLOCK)
            reports[kind] += [report for report in made if report is not None]
    return times, reports


def measure(
    kinds: Iterable[str], shape: Shape, device: str, compiled: bool, lr: float
) -> list[dict]:
    """Return one record for each variant; a variant that raises is left out, after its trace."""
    steps: dict[str, Callable[[], StepReport | None]] = {}
    seen: dict[str, Seen] = {}
    failed: list[dict] = []
    for kind in kinds:
        gc.collect()
        others = torch.cuda.memory_allocated() if device == "cuda" else 0
        begin = perf_counter()
        try:
            step = variant(kind, shape, device, compiled, lr)
            seen[kind] = run_alone(step, others, device)
        except Exception as error:
            traceback.print_exc()
            failed.append({"variant": kind, "compiled": compiled, "error": repr(error)[:300]})
            continue
        steps[kind] = step
        print(f"  {kind}: {ALONE} steps alone in {perf_counter() - begin:.1f} s", flush=True)
        for regime, places in seen[kind].places.items():
            print(f"    {regime}, host reads by place, {seen[kind].reads[regime]} a step")
            for place, count in places.most_common(12):
                print(f"      {count:5d}  {place}")
    times, reports = time_in_turn(steps, shape, device)
    blocks, more = time_in_blocks(steps, shape, device)
    for kind in steps:
        print(f"  {kind}: blocks, ms a step: {[round(each, 2) for each in blocks[kind]]}")
    records = [
        {
            "variant": kind, "compiled": compiled, "device": _device_name(device),
            "torch": torch.__version__, "shape": asdict(shape), "learning_rate": lr,
            **_times(times[kind], times["plain"], reports[kind]),
            **_free(blocks[kind], blocks["plain"], more[kind]),
            **_memory(seen[kind], seen["plain"]),
            **_looked(reports[kind] + more[kind]),
        }
        for kind in steps
    ]  # fmt: skip
    return records + failed


def _times(own: list[float], plain: list[float], reports: list[StepReport]) -> dict[str, object]:
    found: dict[str, object] = {
        "steps": len(own), "median_ms": statistics.median(own), "mean_ms": statistics.mean(own),
        "plain_median_ms": statistics.median(plain),
        "median_ratio": statistics.median(own) / statistics.median(plain),
        "mean_ratio": statistics.mean(own) / statistics.mean(plain),
        "fastest_ratio": min(own) / min(plain),
    }  # fmt: skip
    by_regime: dict[str, list[float]] = {}
    for report, each in zip(reports, own, strict=False):
        by_regime.setdefault(_regime(report), []).append(each)
    for regime, each in by_regime.items():
        found[f"{regime}_ratio"] = statistics.median(each) / statistics.median(plain)
    return found


def _free(own: list[float], plain: list[float], reports: list[StepReport]) -> dict[str, object]:
    """Return the ratios of the blocks, and of those that hold no measured step."""
    found: dict[str, object] = {
        "free_ms": statistics.mean(own), "blocks": len(own),
        "free_ratio": statistics.mean(own) / statistics.mean(plain),
        "free_median_ratio": statistics.median(own) / statistics.median(plain),
    }  # fmt: skip
    regimes = [
        {_regime(report) for report in reports[begin : begin + BLOCK]}
        for begin in range(0, len(reports), BLOCK)
    ]
    alone = [each for each, of in zip(own, regimes, strict=False) if of == {"predicted"}]
    if alone:
        found["free_predicted_ratio"] = statistics.median(alone) / statistics.median(plain)
    return found


def _memory(seen: Seen, plain: Seen) -> dict[str, object]:
    found: dict[str, object] = {}
    for regime, reads in seen.reads.items():
        found[f"{regime}_reads"] = statistics.median(reads)
        found[f"{regime}_places"] = dict(seen.places[regime])
    for regime, peak in seen.peaks.items():
        found[f"{regime}_peak_mib"] = peak / 2**20
        found[f"{regime}_memory"] = peak / plain.peaks["plain"]
    return found


def _looked(reports: list[StepReport]) -> dict[str, object]:
    if not reports:
        return {}
    shares = Counter(_estimator(report) for report in reports)
    values = [report.normalized_step for report in reports]
    return {
        "r_median": statistics.median(values), "r_mean": statistics.mean(values),
        "r_max": max(values), "statuses": dict(Counter(report.status for report in reports)),
        "mean_learning_rate": statistics.mean(r.effective_learning_rate for r in reports),
        "estimators": {name: count / len(reports) for name, count in shares.most_common()},
    }  # fmt: skip


def _estimator(report: StepReport) -> str:
    name, _, more = report.estimator.partition(" (")
    return f"{name}, compared" if more else name


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def table(records: list[dict]) -> str:
    """Return the records as a Markdown table."""
    titles = [
        "variant", "compiled", "ms", "mean time", "median time", "of a predicted step",
        "of a measured step", "free-running", "free, predicted", "peak memory, predicted",
        "peak memory, measured", "host reads, predicted", "host reads, measured", "r, median / max",
        "mean rate", "estimators", "status",
    ]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(_cells(record)) + " |" for record in records]
    measured = [record for record in records if "shape" in record]
    if measured:
        first, shape = measured[0], measured[0]["shape"]
        lines += [
            "",
            f"Multiples of the plain step. {first['device']}, torch {first['torch']}; GPT of width "
            f"{shape['width']}, depth {shape['depth']}, {shape['vocabulary']} words, batch "
            f"{shape['batch']} x {shape['length']}, bf16 autocast, fused AdamW, learning rate "
            f"{first['learning_rate']:g}; {first['steps']} steps in turn, "
            f"{first['blocks']} blocks of {BLOCK}.",
        ]
    return "\n".join(lines)


def _cells(record: dict) -> list[str]:
    name = [record["variant"], "yes" if record["compiled"] else "no"]
    if "error" in record:
        return [*name, record["error"].replace("|", "/").replace("\n", " "), *[""] * 14]

    def ratio(key: str, form: str = ".3f") -> str:
        compared = key.replace("measured", "compared")
        if key not in record and compared in record:
            return format(record[compared], form) + " c"
        return format(record[key], form) if key in record else ""

    memory = "plain_memory" if record["variant"] == "plain" else "predicted_memory"
    reads = "plain_reads" if record["variant"] == "plain" else "predicted_reads"
    shares = record.get("estimators", {}).items()
    return [
        *name, ratio("median_ms", ".2f"), ratio("mean_ratio"), ratio("median_ratio"),
        ratio("predicted_ratio"), ratio("measured_ratio"), ratio("free_ratio"),
        ratio("free_predicted_ratio"), ratio(memory), ratio("measured_memory"),
        ratio(reads, "g"), ratio("measured_reads", "g"),
        f"{record['r_median']:.2g} / {record['r_max']:.2g}" if shares else "",
        ratio("mean_learning_rate", ".2g"),
        ", ".join(f"{name} {share:.1%}" for name, share in shares),
        ", ".join(f"{name} {count}" for name, count in record.get("statuses", {}).items()),
    ]  # fmt: skip


def checks(report: Path) -> tuple[list[str], bool]:
    """Return one line for each test of a JUnit report, and whether none failed."""
    lines, is_well = [], True
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        words = {child.tag for child in case}
        word = "FAIL" if words & {"failure", "error"} else "skip" if "skipped" in words else "PASS"
        is_well &= word != "FAIL"
        figures = [each.get("value") or "" for each in case.iter("property")]
        lines.append(" ".join([word, case.get("name") or "", "--", *figures]))
    return lines, is_well


def _warm_up(device: str) -> None:
    """Load what a process holds once, which is no part of a step."""
    step = variant("jvp", SHAPES["tiny"], device, compiled=False, lr=1e-4)
    for _ in range(4):
        step()


def main() -> None:
    """Time what was asked for, print it, and exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--size", choices=SHAPES, default="100m" if has_gpu else "tiny")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--junit", type=Path, help="report of the tests, to print beside")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    kinds = ["plain", *(kind for kind in arguments.variant if kind != "plain")]
    shape = SHAPES[arguments.size]
    size = sum(param.numel() for param in GPT(shape).parameters())
    print(f"{size / 1e6:.1f} million parameters, {len(text(shape.vocabulary))} words", flush=True)
    _warm_up(arguments.device)
    records: list[dict] = []
    for compiled in arguments.compile:
        print(f"compiled: {compiled}", flush=True)
        torch.compiler.reset()
        try:
            records += measure(kinds, shape, arguments.device, compiled == "yes", arguments.lr)
        except Exception as error:
            traceback.print_exc()
            what = {"variant": "all", "compiled": compiled == "yes", "error": repr(error)[:300]}
            records.append(what)
        gc.collect()
        if arguments.json is not None:  # what there is, should the next be cut off
            arguments.json.write_text(json.dumps(records, indent=1))
        if arguments.markdown is not None:
            arguments.markdown.write_text(table(records) + "\n")
    lines, is_well = [], True
    if arguments.junit is not None and arguments.junit.exists():
        lines, is_well = checks(arguments.junit)
    text_out = "\n".join([*lines, "", table(records)])
    print(text_out, flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text_out + "\n")
    raise SystemExit(0 if is_well and not any("error" in each for each in records) else 1)


if __name__ == "__main__":
    main()
