"""Start a script of tests/processes."""

import subprocess
import sys
from pathlib import Path

PROCESSES = Path(__file__).parents[1] / "processes"


def run_script(name, *args, timeout=120):
    """Run a script to its end, which must be a success; its own time limit should end first."""
    command = [sys.executable, str(PROCESSES / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
