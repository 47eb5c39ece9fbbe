"""Which faults of one rank's gradient are named under DDP, how soon, and how often wrongly.

    nice python tests/benchmarks/rank_gradients.py [NUM_RANKS ...]

Writes ``results/rank_gradients.md``. Every fault begins at a random step, is audited in one step of
ten, and lasts; false names are counted over clean training. Real gloo ranks on one machine.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "processes"))
import gradient_ranks
from launch import run

RESULTS = Path(__file__).parent / "results" / "rank_gradients"
INTERVAL, ONSETS, CLEAN = 10, 5, 2000
FAULTS = {"whole gradient x 1.05": "scaled", "one layer stale": "stale", "sign": "sign"}


def measure(rank: int, output: str) -> None:
    """Train with each fault and without, on this rank."""
    kept, last = {"pairwise_every": 1}, gradient_ranks.dist.get_world_size() - 1
    for dtype in ("float32", "bfloat16"):
        options = {"metrics": kept, "autocast": dtype == "bfloat16"}
        for name, kind in FAULTS.items():
            for onset in range(ONSETS):
                gradient_ranks.FAULTY_FROM = random.Random(f"{name} {onset}").randrange(40, 60)
                gradient_ranks.train(
                    output, f"{dtype} {kind} {onset} {gradient_ranks.FAULTY_FROM}", fault=kind,
                    ranks=(last,), steps=100, audit_interval=INTERVAL, **options,
                )  # fmt: skip
        gradient_ranks.train(output, f"{dtype} clean", steps=CLEAN, **options)


def events(run_dir: Path) -> list[dict[str, object]]:
    """Return what the audits of a run found wrong."""
    lines = map(json.loads, (run_dir / "run.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("finding") == "wrong"]


def found(output: Path, num_ranks: int) -> list[dict[str, object]]:
    """Return a row for each fault and type, and one for clean training."""
    rows: list[dict[str, object]] = []
    for dtype in ("float32", "bfloat16"):
        for name, kind in FAULTS.items():
            delays, names = [], 0
            for run_dir in sorted(output.glob(f"{dtype}_{kind}_*")):
                told = events(run_dir)
                onset = int(run_dir.name.rpartition("_")[2])
                right = [each["step"] - onset for each in told if each["ranks"] == [num_ranks - 1]]
                delays += right[:1]
                names += len(told) - len(right[:1])
            rows.append({"fault": name, "dtype": dtype, "delays": delays, "others": names})
        told = events(output / f"{dtype}_clean")
        rows.append({"fault": f"none, {CLEAN} steps, each audited", "dtype": dtype, "delays": [],
                     "others": len(told)})  # fmt: skip
    return [{"ranks": num_ranks, **row} for row in rows]


def markdown(rows: list[dict[str, object]]) -> str:
    """Return the table."""
    lines = [
        "# Faults in one rank's gradient", "",
        "`nice python tests/benchmarks/rank_gradients.py`, gloo on a CPU. The fault begins on the "
        f"last rank within its backward pass, at {ONSETS} random steps, and lasts; one step in "
        f"{INTERVAL} is audited (audits that are due anyway included). Other alarms: any that does "
        "not name this rank alone, and those after the first: a small fault alarms by the mean of "
        "the ranks at one audit, and names the rank at the next.", "",
        "| ranks | fault | type | rank named | after steps | other alarms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        delays = row["delays"]
        named = f"{len(delays)} of {ONSETS}" if "none" not in str(row["fault"]) else "-"
        after = f"{min(delays)} to {max(delays)}" if delays else "-"
        cells = row["ranks"], row["fault"], row["dtype"], named, after, row["others"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run on so many ranks, by default on two and on four, and write the table."""
    results = RESULTS.with_suffix(".json")
    rows = json.loads(results.read_text()) if results.exists() else []
    for num_ranks in map(int, sys.argv[1:] or (2, 4)):
        with tempfile.TemporaryDirectory() as output:
            run(measure, num_ranks, output, timeout=7200)
            new = found(Path(output), num_ranks)
        rows = [row for row in rows if row["ranks"] != num_ranks] + new
        results.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
