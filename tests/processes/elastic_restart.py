"""Train under torchrun from the last checkpoint: ``elastic_restart.py FOLDER [DIES_AT]``.

Rank 1 is killed in step DIES_AT of the first attempt; torchrun then starts all ranks again. Each
rank leaves what it ended with in FOLDER.
"""

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from safestep import SafeStep

NUM_STEPS, SAVED_EVERY = 12, 4


def main(folder: Path, dies_at: int) -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    connect(attempt)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.3)
    guard = SafeStep(optimizer, ddp, run_dir=folder)
    torch.manual_seed(rank)  # data and dropout
    parts = (ddp, optimizer, guard)
    first = load(folder / f"last{rank}.pt", parts)
    reports = []
    for step in range(first, NUM_STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(ddp(torch.randn(8, 8)), torch.arange(8) % 4)
        loss.backward()
        if step == dies_at and rank == 1 and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        reports.append(asdict(guard.last))
        if (step + 1) % SAVED_EVERY == 0:
            save(folder / f"last{rank}.pt", step + 1, parts)
    found = {"first": first, "after": model.state_dict(), "reports": reports}
    torch.save(found, folder / f"final{rank}.pt")
    dist.destroy_process_group()


def connect(attempt):
    """Join the group: without a prefix, a rank may find the address of one that was killed."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"attempt{attempt}", dist.TCPStore(*place, is_master=False))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def save(path, step, parts):
    state = {"step": step, "parts": [part.state_dict() for part in parts]}
    torch.save({**state, "random": torch.get_rng_state()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    dist.barrier()  # all ranks have one of the same step


def load(path, parts):
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for part, values in zip(parts, state["parts"], strict=True):
        part.load_state_dict(values)
    torch.set_rng_state(state["random"])
    return state["step"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int([*sys.argv, "-1"][2]))
