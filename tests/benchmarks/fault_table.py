"""Print the fault table: what was broken on purpose, what survived it, and what was lost.

Usage: ``python tests/benchmarks/fault_table.py > fault_table.md``. A row is one function of
``run_faults`` or ``rank_faults``. It takes some five minutes.
"""

import sys
import tempfile
from pathlib import Path

import rank_faults
import run_faults


def main() -> None:
    """Write the table, one row a fault."""
    sys.stdout.write("| fault | tried | survived | lost |\n|---|---|---|---|\n")
    for name, function in (run_faults.FAULTS | rank_faults.FAULTS).items():
        with tempfile.TemporaryDirectory() as folder:
            row = function(Path(folder) / "run")
        sys.stdout.write(f"| {' | '.join((name, *row))} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
