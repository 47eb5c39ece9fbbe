"""torchrun starts the ranks again after one was killed: the run goes on as if nothing happened."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.scripts import PROCESSES

from safestep import read_run

pytestmark = pytest.mark.slow


def torchrun(folder, *args, restarts=0):
    folder.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(restarts), str(PROCESSES / "elastic_restart.py"), str(folder), *args,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"final{rank}.pt") for rank in range(2)]


def test_ranks_that_torchrun_restarts_end_bitwise_as_an_uninterrupted_run(tmp_path):
    whole = torchrun(tmp_path / "whole")
    restarted = torchrun(tmp_path / "restarted", "6", restarts=1)

    for one, other in zip(whole, restarted, strict=True):
        assert (one["first"], other["first"]) == (0, 4)
        assert one["after"].keys() == other["after"].keys()
        assert all(torch.equal(value, other["after"][key]) for key, value in one["after"].items())
        reports = [[{**r, "seconds": 0} for r in run["reports"][-8:]] for run in (one, other)]
        assert reports[0] == reports[1]
        assert "clipped" in {report["status"] for report in other["reports"]}

    run = read_run(tmp_path / "restarted")
    assert run.steps["step"].tolist() == list(range(12))
    assert "resumed" in [event["name"] for event in run.events]
