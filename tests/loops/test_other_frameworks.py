"""The blocks of notebooks/other_frameworks.md run as they stand, and the guard saw every step."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import safestep

PAGE = Path(__file__).parents[2] / "notebooks" / "other_frameworks.md"
SECTIONS = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
BLOCKS = {
    title: block
    for title, text in SECTIONS
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
}
STEPS = 4

pytestmark = [
    pytest.mark.loops,
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::UserWarning:(torch|accelerate|skorch|ignite|fastai|timm)"),
]
# What a process of its own begins and ends with: one of two ranks.
BEFORE = """
import torch, torch.distributed, safestep
from loops.test_other_frameworks import given
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
globals().update(given())
"""
AFTER = """
assert guard.last.step == 3 and guard.last.status in ("ok", "clipped"), guard.last
torch.distributed.destroy_process_group()
"""


def given():
    """Return what the page says is the reader's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    inputs, targets = torch.randn(64, 8), torch.randint(4, (64,))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=64 // STEPS
    )
    return {
        "torch": torch, "nn": nn, "safestep": safestep, "model": model, "loader": loader,
        "inputs": inputs, "targets": targets, "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }  # fmt: skip


def test_the_blocks_are_short():
    assert len(BLOCKS) >= 9
    for title, block in BLOCKS.items():
        lines = [line for line in block.splitlines() if line and not line.startswith("from ")]
        assert len(lines) <= 10, title


@pytest.mark.parametrize("title", BLOCKS)
def test_a_block_runs_as_written(title, tmp_path, monkeypatch):
    block = BLOCKS[title]
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"^from (\w+)", block, re.MULTILINE):
        pytest.importorskip(package, exc_type=(ImportError, RuntimeError))
    if block.startswith("# torchrun"):
        return run_on_two_ranks(block, tmp_path)
    names = given()

    exec(block, names)

    guard = names["guard"] if "guard" in names else names["guard_of"].guard
    assert guard.last.status in {"ok", "clipped"}, guard.last
    assert guard.last.step > 0
    return None


def run_on_two_ranks(block, folder):
    script = folder / "train.py"
    script.write_text(BEFORE + block + AFTER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)],
        cwd=folder, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1] / "tests")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
