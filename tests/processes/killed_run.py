"""Train with checkpoints in a process of its own, which may be killed at any moment.

Usage: ``killed_run.py FOLDER NUM_KILLS SEED [ahead]``; the last is for ``copy=False``. The parent,
which has torch imported, forks a child that trains from the last checkpoint, and kills it with
SIGKILL after a random time; again and again, then it lets one finish. It prints, as JSON, at which
step each child was killed, and what was wrong with the log after a kill.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from safestep import SafeStep, read_run

NUM_STEPS, EPOCH, ACCUMULATE = 400, 16, 2


def train(folder: Path, *, num_steps: int = NUM_STEPS, copy: bool = True) -> None:
    """Train from the checkpoint in `folder`, if there is one, and leave the final state there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, targets = torch.randn(EPOCH * 16, 8), torch.randint(4, (EPOCH * 16,))
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    optimizers = [
        torch.optim.AdamW(model[0].parameters(), lr=0.3),
        torch.optim.SGD(model[3].parameters(), lr=3.0, momentum=0.9),
    ]
    guards = [SafeStep(o, model, run_dir=folder, copy=copy) for o in optimizers]
    step = load(folder / "last.pt", model, optimizers, guards)
    while step < num_steps:
        batch = step % (EPOCH // ACCUMULATE)  # a checkpoint lies in the middle of an epoch
        for part in range(ACCUMULATE):
            rows = slice((batch * ACCUMULATE + part) * 16, (batch * ACCUMULATE + part + 1) * 16)
            loss = cross_entropy(model(data[rows]), targets[rows]) / ACCUMULATE
            loss.backward()
        for guard, optimizer in zip(guards, optimizers, strict=True):
            guard.log(loss=loss, optimizer=guards.index(guard))
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        step += 1
        if step % 5 == 0:
            save(folder / "last.pt", step, model, optimizers, guards)
    save(folder / "final.pt", step, model, optimizers, guards)


def save(path, step, model, optimizers, guards):
    parts = (model, *optimizers, *guards)
    state = {"step": step, "parts": [part.state_dict() for part in parts]}
    torch.save({**state, "random": torch.get_rng_state()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load(path, model, optimizers, guards):
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for part, values in zip((model, *optimizers, *guards), state["parts"], strict=True):
        part.load_state_dict(values)
    torch.set_rng_state(state["random"])
    return state["step"]


def start(folder: Path, *, copy: bool) -> int:
    child = os.fork()
    if child == 0:
        try:
            train(folder, copy=copy)
        finally:
            os._exit(0 if (folder / "final.pt").exists() else 1)
    return child


def main() -> None:
    """Kill the child, look at the log, and go on."""
    folder, num_kills = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True)
    copy = "ahead" not in sys.argv
    with tempfile.TemporaryDirectory() as first:  # a child then starts with everything imported
        train(Path(first), num_steps=2, copy=copy)
    chance = random.Random(int(sys.argv[3]))
    killed_at, wrong = [], []
    while len(killed_at) < num_kills:
        child = start(folder, copy=copy)
        log = folder / "run.jsonl"
        size = log.stat().st_size if log.exists() else 0
        size += chance.choice((0, *range(0, 30_000, 1000)))  # how far it gets: up to 30 steps
        deadline = time.monotonic() + 20
        # One in six is killed while it starts.
        while len(killed_at) % 6 and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > size:
                break
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not (folder / "run.jsonl").exists():  # killed before its first record
            killed_at.append(-1)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a last line is torn
            run = read_run(folder)
        steps = run.steps["step"].tolist()
        killed_at.append(max(steps, default=-1))
        if sorted(set(steps)) != list(range(killed_at[-1] + 1)) or run.left_out:
            wrong.append(f"kill {len(killed_at)}: {run.left_out} {len(set(steps))} steps")
        (folder / "final.pt").unlink(missing_ok=True)
    _, status = os.waitpid(start(folder, copy=copy), 0)
    found = {"killed_at": killed_at, "wrong": wrong, "status": status}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
