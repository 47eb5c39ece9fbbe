"""A Lightning run that is killed again and again is the run that was never stopped, bit for bit."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from safestep import read_run

SCRIPT = Path(__file__).parents[1] / "processes" / "killed_trainer.py"
EXACT = ("step", "status", "scale", "loss", "step_norm", "estimator", "normalized_step")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's, about workers and loggers
def test_trainer_killed_ten_times_is_the_run_that_was_not(tmp_path):
    """Checkpoints lie at every third step, an epoch has sixteen."""
    runpy.run_path(str(SCRIPT))["train"](tmp_path / "whole")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "killed"), "10", "0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    found = json.loads(done.stdout.splitlines()[-1])

    assert (found["wrong"], found["status"], len(found["killed_at"])) == ([], 0, 10)
    assert len(set(found["killed_at"])) > 4
    finals = [torch.load(tmp_path / name / "final.pt") for name in ("killed", "whole")]
    for name, value in finals[1].items():
        assert torch.equal(finals[0][name], value), name
    run, whole = read_run(tmp_path / "killed"), read_run(tmp_path / "whole")
    for name in EXACT:
        np.testing.assert_array_equal(run[name], whole[name], err_msg=name)
    assert {"ok", "clipped"} <= set(run["status"])
