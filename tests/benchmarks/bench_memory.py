"""What a guarded step holds: peak of the living tensors of one step, with and without a copy.

Every row is a process of its own. On the CPU the allocator's events of one step are added up, on
CUDA its own peak is read; P is the size of the parameters.

    python tests/benchmarks/bench_memory.py --model wide deep --optimizer AdamW --foreach
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from safestep import SafeStep
from safestep.guard.predictor import AUDIT_INTERVAL, FIRST_STEPS

WARM_UP = 4  # the first three guarded steps are cross-checked by a second estimator


@dataclass
class Row:
    """One line of the table."""

    model: str
    optimizer: str
    foreach: bool
    device: str
    estimator: str = "plain"
    copy: bool = True
    is_first: bool = False


def make_model(name: str, width: int) -> tuple[nn.Module, torch.Tensor]:
    """Return a model and its inputs: mostly parameters ("wide") or mostly activations ("deep")."""
    if name == "deep":
        layers = [nn.Linear(64, 512, bias=False)]
        layers += [layer for _ in range(8) for layer in (nn.Tanh(), nn.Linear(512, 512, False))]
        return nn.Sequential(*layers), torch.randn(8192, 64)
    count = {"wide": 4, "wide16": 16}[name]
    layers = [layer for _ in range(count) for layer in (nn.Linear(width, width, False), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(8, width)


def peak(row: Row, width: int) -> tuple[float, float]:
    """Return the peak of living bytes within a step, and the bytes of the parameters."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, inputs = make_model(row.model, width)
    model, inputs = model.to(row.device), inputs.to(row.device)
    targets = torch.randint(10, (len(inputs),)).to(row.device)
    optimizer_class = getattr(torch.optim, row.optimizer)
    options = {"momentum": 0.9} if row.optimizer == "SGD" else {}
    options |= {} if row.optimizer == "Muon" else {"foreach": row.foreach}
    optimizer = optimizer_class(model.parameters(), lr=1e-6, **options)
    guard = None
    if row.estimator != "plain":
        guard = SafeStep(optimizer, model, estimator=row.estimator, copy=row.copy)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    for _ in range(1 if row.is_first else WARM_UP):
        step()
    if guard is not None and row.estimator == "auto":
        state = guard.state_dict()
        state["predictor"] |= {"steps": FIRST_STEPS, "interval": AUDIT_INTERVAL}
        guard.load_state_dict(state)
        step()
    optimizer.zero_grad()
    state = [v for entry in optimizer.state.values() for v in entry.values()]
    held = [*model.parameters(), *filter(torch.is_tensor, state), inputs]
    found = _peak_within(step, sum(tensor.nbytes for tensor in held), row.device)
    if guard is not None and guard.last is not None:
        assert (guard.last.estimator == "predicted") == (row.estimator == "auto")
    return found, sum(param.nbytes for param in model.parameters())


def _peak_within(step: Callable[[], None], held: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    highest = held
    for _, change in changes:
        held += change
        highest = max(highest, held)
    return highest


def rows(model: str, optimizer: str, foreach: bool, device: str) -> list[Row]:
    """Return the rows of one table, the plain step first."""
    common = (model, optimizer, foreach, device)
    guarded = [
        Row(*common, estimator, copy) for copy in (True, False) for estimator in ("auto", "jvp")
    ]
    return [Row(*common), *guarded, Row(*common, "jvp", False, is_first=True)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", nargs="+", default=["wide"], choices=["wide", "wide16", "deep"])
    parser.add_argument("--optimizer", nargs="+", default=["AdamW"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--foreach", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    print("| model | optimizer | step | peak | in P | extra |\n|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for model in arguments.model:
        for optimizer in arguments.optimizer:
            plain = 0.0
            for row in rows(model, optimizer, arguments.foreach, arguments.device):
                with context.Pool(1) as pool:
                    found, size = pool.apply(peak, (row, arguments.width))
                plain = plain or found
                kind = {"auto": "auto, predicted", "jvp": "jvp, measured"}.get(row.estimator)
                name = "plain" if kind is None else kind + ("" if row.copy else ", no copy")
                print(
                    f"| {model} | {optimizer}{' foreach' if row.foreach else ''} | {name}"
                    f"{', cross-checked' if row.is_first else ''} | {found / 2**20:.1f} MiB | "
                    f"{found / size:.2f} | {found / plain - 1:+.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
