"""The table of faults planted on a real rank: who is named, how soon, and what cannot be seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "worker_faults.py"
FAULTY, ONSET = 2, 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run on four processes by its name; runs of one name in a list."""
    output = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, str(SCRIPT), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for result in json.loads(output.read_text()):
        found.setdefault(result["name"], []).append(result)
    return found


@pytest.mark.slow
def test_clean_runs_of_2000_steps_have_no_event(runs):
    clean = [*runs["clean, fresh data"], *runs["clean, memorised data"]]

    assert [(result["steps"], result["events"]) for result in clean] == [(2000, [])] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "delay"),
    [
        ("shuffled labels", 30),
        ("one batch repeated", 40),
        ("another seed, others in step", 30),
        ("loss x 8", 30),
        ("loss x 1.5", 30),
        ("bit 30 flipped once", 0),
        ("NaN", 0),
    ],
)
def test_the_faulty_worker_alone_is_named_in_time(runs, name, delay):
    ((step, rank, message),) = runs[name][0]["events"]

    assert rank == FAULTY, message
    assert ONSET <= step <= ONSET + delay, message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["another seed, data dealt out", "bit 23 flipped once"])
def test_a_fault_that_changes_no_statistic_is_not_seen(runs, name):
    """A seed on dealt-out data leaves like workers; the low exponent bit doubles one number."""
    assert runs[name][0]["events"] == []
