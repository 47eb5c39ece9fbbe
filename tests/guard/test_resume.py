"""A run that goes on from a checkpoint is the run that was never stopped, bit for bit."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from safestep import read_run

SCRIPT = Path(__file__).parents[1] / "processes" / "killed_run.py"
train = runpy.run_path(str(SCRIPT))["train"]

EXACT = (
    "step", "optimizer", "status", "scale", "loss", "step_norm", "estimator", "normalized_step",
)  # fmt: skip


def final(folder):
    state = torch.load(folder / "final.pt", weights_only=True)
    return {**state["parts"][0], "random": state["random"]}


def assert_same_run(folder, whole):
    for name, value in final(whole).items():
        assert torch.equal(final(folder)[name], value), name
    run, unkilled = read_run(folder), read_run(whole)
    for name in EXACT:
        np.testing.assert_array_equal(run[name], unkilled[name], err_msg=name)
    assert {"ok", "clipped"} <= set(run["status"])


@pytest.mark.parametrize("copy", [True, False], ids=["copies", "ahead"])
def test_run_of_two_optimizers_resumes_mid_epoch_bitwise(tmp_path, copy):
    """With accumulation and dropout; a checkpoint lies at every fifth step, an epoch has eight."""
    for name, ends in {"whole": (40,), "halted": (13, 27, 40)}.items():
        (tmp_path / name).mkdir()
        for end in ends:
            train(tmp_path / name, num_steps=end, copy=copy)

    assert_same_run(tmp_path / "halted", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("copy", [True, False], ids=["copies", "ahead"])
def test_run_killed_thirty_times_is_the_run_that_was_not(tmp_path, copy):
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", copy=copy)
    command = [sys.executable, SCRIPT, tmp_path / "killed", "30", "0", *([] if copy else ["ahead"])]
    output = subprocess.run(map(str, command), check=True, capture_output=True, text=True).stdout
    found = json.loads(output)

    assert found["wrong"] == []
    assert found["status"] == 0
    assert len(found["killed_at"]) == 30
    assert len(set(found["killed_at"])) > 10
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
