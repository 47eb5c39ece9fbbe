"""The Lightning notebook runs as a user's script too, from a folder that holds nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "04_lightning_in_two_lines.ipynb"


@pytest.mark.slow
def test_lightning_notebook_runs_as_a_script(tmp_path):
    """A class of the main script, no event loop, and an empty folder to write to."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / "train.py"
    script.write_text("\n\n".join(code), encoding="utf-8")

    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    assert "with it and the callbacks" in done.stdout
