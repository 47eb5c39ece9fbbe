"""Which planted faults in a gradient an audit sees, how soon, and how often it errs.

    nice python tests/benchmarks/gradient_faults.py [faults] [clean]

Writes ``results/gradient_faults.json`` and ``.md``; of the two parts, the one that is not named
stays as it was. Each fault is planted in one step of a GPT,
many times, with clean steps between; then from a random step on, with one audit in ten steps.
False alarms are counted over clean training of five models.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from safestep import SafeStep

RESULTS = Path(__file__).parent / "results" / "gradient_faults"
CLASSES, LENGTH, WIDTH = 64, 16, 64
CLEAN_FIRST, TIMES, INTERVAL, ONSETS, CLEAN = 70, 20, 10, 5, 2000
Fault = Callable[[dict[str, Tensor], dict[str, Tensor]], None]


class Block(nn.Module):
    """A pre-norm Transformer block with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.norm(x)).unflatten(-1, (3, 4, WIDTH // 4))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(CLASSES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(ids) + self.places.weight[: ids.shape[1]]))


class Recurrent(nn.Module):
    """A GRU, classes from its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.gru(sequences)[0][:, -1])


def _text() -> Callable[[], tuple[Tensor, Tensor]]:
    codes = torch.tensor(list(Path(nn.__file__).read_bytes()[:20000])) % CLASSES

    def batch() -> tuple[Tensor, Tensor]:
        places = torch.randint(len(codes) - LENGTH - 1, (8, 1)) + torch.arange(LENGTH + 1)
        return codes[places][:, :-1], codes[places][:, 1:]

    return batch


def _points(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    teacher = torch.randn(torch.Size(shape).numel(), 10)

    def batch() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(32, *shape)
        return inputs, (inputs.flatten(1) @ teacher).argmax(-1)

    return batch


def _mlp() -> nn.Module:
    layers = [nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def _convolutions() -> nn.Module:
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


def _sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)  # type: ignore[arg-type]


def _adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)  # type: ignore[arg-type]


# Model, data, optimizer, and the step from which on gradients are clipped.
MODELS = {
    "GPT, AdamW": (GPT, _text, _adamw, None),
    "GPT, SGD, clipped from step 200": (GPT, _text, _sgd, 200),
    "MLP with dropout, AdamW": (_mlp, lambda: _points(16), _adamw, None),
    "convolutions with BatchNorm, SGD": (_convolutions, lambda: _points(1, 8, 8), _sgd, None),
    "GRU, SGD, clipped from the start": (Recurrent, lambda: _points(6, 8), _sgd, 0),
}
LAYER, TILED = "blocks.0.out.weight", "blocks.0.query_key_value.weight"


def _flip(bit: int) -> Fault:
    def fault(gradients: dict[str, Tensor], _: dict[str, Tensor]) -> None:
        words = gradients["blocks.1.mlp.0.weight"].view(torch.int32).view(-1)
        words[1234] ^= 1 << bit

    return fault


def _scaled(factor: float, name: str | None = None, part: slice = slice(None)) -> Fault:
    """Return a fault in all gradients, in one, or in a square tile of it."""

    def fault(gradients: dict[str, Tensor], _: dict[str, Tensor]) -> None:
        for gradient in gradients.values() if name is None else [gradients[name]]:
            (gradient if part == slice(None) else gradient[part, part]).mul_(factor)

    return fault


def _stale(gradients: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    gradients[LAYER].copy_(before[LAYER])


FAULTS: dict[str, Fault] = {
    "whole gradient x 1.05": _scaled(1.05),
    "mean over 4 micro-batches forgotten": _scaled(4.0),
    "one layer stale": _stale,
    "one layer x 1.1": _scaled(1.1, LAYER),
    "16 x 16 tile of a layer zeroed": _scaled(0.0, TILED, slice(16)),
    "16 x 16 tile of a layer x 4": _scaled(4.0, TILED, slice(16)),
    "one entry, lowest exponent bit": _flip(23),
    "one entry, exponent bit 26": _flip(26),
    "one entry, highest exponent bit": _flip(30),
}


class Training:
    """Train a model with a guard, and count what it finds wrong.

    Args:
        name: Which of MODELS.
        dtype: "float32", or "bfloat16" for autocast.
        interval: Audit one in so many steps.
    """

    def __init__(self, name: str, dtype: str, interval: int = 1) -> None:
        torch.manual_seed(1)
        make, data, optimizer, self._clips_from = MODELS[name]
        self._model, self._batch, self._dtype = make(), data(), dtype
        self._optimizer = optimizer(self._model.parameters())
        self.guard = SafeStep(self._optimizer, self._model, audit_interval=interval)
        self._stale: dict[str, Tensor] = {}
        self._told: list[dict[str, object]] = []
        tell = self.guard._audit._tell
        self.guard._audit._tell = lambda event: (self._told.append(event), tell(event))[1]

    def step(self, fault: Fault | None = None) -> bool:
        """Make a step, and return whether the gradient was found wrong in it."""
        self._optimizer.zero_grad()
        inputs, labels = self._batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == "bfloat16"):
            logits = self._model(inputs)
        loss = functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
        loss.backward()
        gradients = {name: param.grad for name, param in self._model.named_parameters()}
        if fault is not None:
            fault(gradients, self._stale)
        self._stale = {name: g.clone() for name, g in gradients.items() if name == LAYER}
        at = self.guard._controller.step
        if self._clips_from is not None and at >= self._clips_from:
            nn.utils.clip_grad_norm_(self._model.parameters(), 0.1)
        self._told.clear()
        self._optimizer.step()
        found = [event for event in self._told if event.finding == "wrong"]
        return bool(found) or self.guard.last.status == "skipped"

    @property
    def audits(self) -> int:
        """Number of matching steps that the audit remembers."""
        return len(self.guard._audit._usual)


def faults(dtype: str) -> Iterator[dict[str, object]]:
    """Yield for each fault how often it is seen in one step, and how soon where it lasts."""
    once, lasting = Training("GPT, AdamW", dtype), Training("GPT, AdamW", dtype, INTERVAL)
    for _ in range(CLEAN_FIRST):
        once.step()
        lasting.step()
    for name, fault in FAULTS.items():
        seen, false = 0, 0
        for _ in range(TIMES):
            seen += once.step(fault)
            false += once.step()
        delays = [_delay(lasting, fault) for _ in range(ONSETS)]
        row = {"fault": name, "dtype": dtype, "seen": seen / TIMES, "delays": delays}
        yield {**row, "false": false}


def _delay(training: Training, fault: Fault) -> int | None:
    """Return the steps until a lasting fault is found, None if it is not within five audits."""
    for _ in range(random.randrange(INTERVAL)):
        training.step()
    found = None
    for delay in range(5 * INTERVAL):
        if training.step(fault):
            found = delay
            break
    for _ in range(INTERVAL):  # an audit finds that it is over
        training.step()
    return found


def clean(dtype: str) -> Iterator[dict[str, object]]:
    """Yield for each model the false alarms of clean training, and the ratio's distance from 1."""
    for name in MODELS:
        training = Training(name, dtype)
        alarms, ratios = 0, []
        for _ in range(CLEAN):
            alarms += training.step()
            ratios.append(training.guard.last.gradient_ratio)
        ratio = torch.tensor(ratios, dtype=torch.float64)
        audited = int(ratio.isfinite().sum())
        median = float((ratio[ratio.isfinite()] - 1).abs().median())
        row = {"model": name, "dtype": dtype, "steps": CLEAN, "audited": audited}
        yield {**row, "alarms": alarms, "median": median}


def markdown(found: dict[str, list[dict[str, object]]]) -> str:
    """Return the two tables."""
    lines = [
        "# Planted faults in a gradient", "",
        "`nice python tests/benchmarks/gradient_faults.py`, on a CPU. Seen: share of "
        f"{TIMES} steps with the fault. Delay: steps until a lasting fault is told, with one audit "
        f"in {INTERVAL} steps (audits that are due anyway included), at {ONSETS} random onsets; "
        "- where five audits did not tell it. A step that the guard does not take counts as seen "
        "(the highest exponent bit).", "",
        "| fault | seen, float32 | delay | seen, bfloat16 | delay |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    by_fault: dict[str, list[str]] = {}
    for row in found["faults"]:
        told = [d for d in row["delays"] if d is not None]
        few = f" ({len(told)} of {ONSETS})" * (len(told) < ONSETS)
        delay = f"{min(told)} to {max(told)}{few}" if told else "-"
        by_fault.setdefault(str(row["fault"]), []).extend((f"{row['seen']:.0%}", delay))
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in by_fault.items()]
    false = sum(int(row["false"]) for row in found["faults"])
    lines += [
        "", f"Alarms at the clean steps between them: {false}.", "",
        "| clean training | type | steps | with a ratio | median distance from 1 | false alarms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {row['model']} | {row['dtype']} | {row['steps']} | {row['audited']} "
        f"| {row['median']:.1e} | {row['alarms']} |"
        for row in found["clean"]
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the parts that are named, and write the tables."""
    warnings.simplefilter("ignore")
    random.seed(0)
    torch.set_num_threads(1)
    results = RESULTS.with_suffix(".json")
    found = json.loads(results.read_text()) if results.exists() else {}
    parts = {"faults": faults, "clean": clean}
    for name in sys.argv[1:] or parts:
        found[name] = []
        for row in chain.from_iterable(map(parts[name], ("float32", "bfloat16"))):
            found[name].append(row)
            sys.stderr.write(f"{row}\n")
            results.write_text(json.dumps(found, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()
