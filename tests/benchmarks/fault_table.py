"""Print the fault table: what was broken on purpose, what survived it, and what was lost.

Usage: ``python tests/benchmarks/fault_table.py [WORD] > fault_table.md``. A row is one function of
``run_faults`` or ``rank_faults``; a word chooses the rows whose fault has it. It takes some five
minutes.
"""

import sys
import tempfile
from pathlib import Path

import rank_faults
import run_faults


def main() -> None:
    """Write the table, one row a fault."""
    sys.stdout.write("| fault | tried | survived | lost |\n|---|---|---|---|\n")
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, function in (run_faults.FAULTS | rank_faults.FAULTS).items():
        if word not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = function(Path(folder) / "run")
        sys.stdout.write(f"| {' | '.join((name, *row))} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
