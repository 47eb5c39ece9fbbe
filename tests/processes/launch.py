"""Start the ranks of a test as forked gloo processes; a test runs the scripts beside this file."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch._dynamo  # noqa: F401  DDP imports it: once before the fork, not in every rank
import torch.distributed as dist
import torch.multiprocessing as mp


def run(
    target: Callable[..., None],
    num_processes: int,
    *args: Any,
    timeout: float = 100,
    group_timeout: timedelta = timedelta(seconds=60),
) -> None:
    """Run ``target(rank, *args)`` on every rank; exit non-zero if one fails or time runs out.

    Forking shares this process's import of torch, which costs more than the tests. It must happen
    before the first backward of this process.
    """
    rendezvous = os.path.join(tempfile.mkdtemp(), "rendezvous")
    context = mp.start_processes(
        _main,
        (num_processes, rendezvous, group_timeout, target, args),
        nprocs=num_processes,
        join=False,
        start_method="fork",
    )
    deadline = time.monotonic() + timeout
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            sys.exit(f"not done after {timeout} s")


def _main(rank, num_processes, rendezvous, group_timeout, target, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=num_processes,
        timeout=group_timeout,
    )
    target(rank, *args)
    dist.destroy_process_group()
