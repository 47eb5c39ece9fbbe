"""Equal replicas raise no alarm, whatever is done to their gradients; a moved one does."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "replica_alarms.py"


@pytest.mark.slow
def test_equal_replicas_raise_no_alarm_and_one_that_moved_does(tmp_path):
    """The 2,000 steps of each setting take ten minutes: ``tests/benchmarks/results``."""
    command = [sys.executable, str(SCRIPT), "60", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]

    assert len(rows) == 9
    assert [events for *_, events in rows[:-1]] == ["0"] * 8
    assert int(rows[-1][-1]) > 0
