"""What guards against bad steps keep of a run: the same training under each, side by side.

Every rule trains the same models on the same data from the same seeds, healthy and in trouble. What
is in the JSON file is not run again: stop it when you like, and go on with the same command.

    python tests/benchmarks/bench_peers.py

The file then has every run; ``--table`` prints what peer_summary.py makes of it, and notebook 07
shows it. The tasks and situations are in peer_tasks.py, the rules in peer_rules.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from importlib.metadata import version
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import torch
from peer_rules import RULES, Rule, available
from peer_summary import COLUMNS, Runs, table
from peer_tasks import RATES, SITUATIONS, STEPS, TASKS, Situation, Task
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "peers.json"
SAVE_SECONDS = 20


def run(task: Task, rule_type: type[Rule], situation: Situation, seed: int) -> list[Any]:
    """Train once and return what came out, in the order of COLUMNS."""
    torch.manual_seed(seed)
    model = task.model()
    start, _ = task.evaluate(model)
    rule = rule_type(model, task.lr, situation.betas)
    begin, losses = process_time(), _train(task, model, rule, situation, seed)
    seconds = process_time() - begin
    rule.before_evaluation()
    final, accuracy = task.evaluate(model)
    return [
        _short(final), _short(accuracy), rule.touched, round(seconds, 2),
        _short(_spike_score(losses)), len(losses), _short(start),
    ]  # fmt: skip


def _train(
    task: Task, model: torch.nn.Module, rule: Rule, situation: Situation, seed: int
) -> list[float]:
    """Train and return the losses, fewer than STEPS where the rule ended the run."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rates = [group["lr"] for group in rule.optimizer.param_groups]
    losses = []
    for step in range(STEPS):
        factor = min(1.0, (step + 1) / situation.warm_up) * situation.rate(step)
        for group, rate in zip(rule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            losses.append(_step(task, model, rule, situation, step, generator))
        except RuntimeError as error:
            if "in a row" not in str(error):  # else the guard ended the run
                raise
            break
    return losses


def _step(
    task: Task, model: torch.nn.Module, rule: Rule, situation: Situation, step: int,
    generator: torch.Generator,
) -> float:  # fmt: skip
    """Make one step of training and return the loss before it."""
    inputs, targets = situation.spoil(step, *task.batch(generator))

    def forward() -> torch.Tensor:
        with situation.context():
            logits = model(inputs)
        return situation.logits(step, logits.float())

    logits = forward()
    loss_of = task.loss(logits, targets, generator)
    loss = loss_of(logits)
    rule.optimizer.zero_grad()
    loss.backward()
    rule.step(loss.detach(), lambda: loss_of(forward()))
    return float(loss.detach())


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _spike_score(losses: list[float]) -> float:
    """Return the share of losses over the rolling mean of 64 by more than 7 standard deviations."""
    spikes = 0
    for index in range(32, len(losses)):
        before = [x for x in losses[max(0, index - 64) : index] if math.isfinite(x)]
        limit = statistics.mean(before) + 7 * statistics.stdev(before) if len(before) > 1 else 0.0
        spikes += not losses[index] <= limit
    return spikes / max(1, len(losses) - 32)


def _wanted(arguments: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Return task, rule, situation and seed of every run, the blocks that belong together first."""
    return [
        (task, rule, situation, str(seed))
        for seed in range(arguments.seeds)
        for task in arguments.task
        for situation in arguments.situation
        for rule in arguments.rule
        if not (situation in RATES and RULES[rule].finds_rate)
        and not (situation != "healthy" and RULES[rule].healthy_only)
    ]


def _load(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    packages = ("torch", "torch-optimi", "pytorch-optimizer", "schedulefree", "prodigyopt")
    versions = {name: version(name) for name in packages}
    return {"columns": COLUMNS, "steps": STEPS, "versions": versions, "runs": {}}


def _save(path: Path, found: dict[str, Any]) -> None:
    """Write all of the file, or nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, separators=(",", ":")))
    part.replace(path)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rule", nargs="+", choices=RULES, default=available())
    parser.add_argument("--situation", nargs="+", choices=SITUATIONS, default=list(SITUATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    found = _load(arguments.json)
    if not arguments.table:
        train(found, _wanted(arguments), arguments.json)
    for task in arguments.task:
        print(f"\n{table(Runs(found), task)}")


def train(found: dict[str, Any], wanted: list[tuple[str, str, str, str]], path: Path) -> None:
    """Make the wanted runs that are not found yet, and write the file as they come."""
    runs, saved = found["runs"], monotonic()
    missing = [
        (task, rule, situation, seed)
        for task, rule, situation, seed in wanted
        if seed not in runs.get(task, {}).get(rule, {}).get(situation, {})
    ]
    try:
        for task, rule, situation, seed in tqdm(missing, "runs", smoothing=0.05):
            result = run(TASKS[task], RULES[rule], SITUATIONS[situation], int(seed))
            of_rule = runs.setdefault(task, {}).setdefault(rule, {})
            of_rule.setdefault(situation, {})[seed] = result
            if monotonic() - saved > SAVE_SECONDS:
                _save(path, found)
                saved = monotonic()
    finally:
        _save(path, found)


if __name__ == "__main__":
    main()
