"""What guards against bad steps keep of a run: the same training under each, side by side.

Every rule trains the same models on the same data from the same seeds, healthy and in trouble. What
is in the JSON file is not run again: stop it when you like, and go on with the same command.

    python tests/benchmarks/bench_peers.py

The file then has every run; ``--table`` prints what peers/summary.py makes of it, and notebook 07
shows it. Tasks, situations and rules are one entry each in peers/tasks.py, peers/situations.py and
peers/rules.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from peers import rules, tasks
from peers.ranks import train_anywhere
from peers.rules import RULES
from peers.situations import RATES, SITUATIONS, STEPS
from peers.summary import COLUMNS, Runs, table
from peers.tasks import TASKS
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "peers.json"
SAVE_SECONDS = 20


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
    return {"columns": COLUMNS, "steps": STEPS, "versions": versions, "commits": [], "runs": {}}


def _commit() -> str:
    """Return the commit of the code that is run."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _save(path: Path, found: dict[str, Any]) -> None:
    """Write all of the file, or nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, separators=(",", ":")))
    part.replace(path)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=tasks.available())
    parser.add_argument("--rule", nargs="+", choices=RULES, default=rules.available())
    parser.add_argument("--situation", nargs="+", choices=SITUATIONS, default=list(SITUATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    found = _load(arguments.json)
    if not arguments.table:
        if (commit := _commit()) not in found["commits"]:
            found["commits"].append(commit)
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
            result = train_anywhere(task, rule, situation, int(seed))
            of_rule = runs.setdefault(task, {}).setdefault(rule, {})
            of_rule.setdefault(situation, {})[seed] = result
            if monotonic() - saved > SAVE_SECONDS:
                _save(path, found)
                saved = monotonic()
    finally:
        _save(path, found)


if __name__ == "__main__":
    main()
