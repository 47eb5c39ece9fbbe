"""A training on several DDP ranks: real processes that talk by gloo, started once."""

from __future__ import annotations

import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import distributed

from .tasks import TASKS
from .training import train

PATIENCE = timedelta(minutes=2)


def train_anywhere(task: str, rule: str, situation: str, seed: int) -> list[Any]:
    """Train once, here or on the task's ranks, and return what came out of the first."""
    if TASKS[task].ranks == 1:
        return train(TASKS[task], rule, situation, seed)
    results = [
        process.submit(_train_here, task, rule, situation, seed, rank)
        for rank, process in enumerate(_processes(TASKS[task].ranks))
    ]
    first, *_ = [result.result() for result in results]
    return first


def _train_here(task: str, rule: str, situation: str, seed: int, rank: int) -> list[Any]:
    return train(TASKS[task], rule, situation, seed, rank)


@cache
def _processes(ranks: int) -> list[ProcessPoolExecutor]:
    meeting = Path(mkdtemp()) / "ranks"
    return [
        ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_join, initargs=(str(meeting), rank, ranks)
        )
        for rank in range(ranks)
    ]


def _join(meeting: str, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    distributed.init_process_group(
        "gloo", f"file://{meeting}", PATIENCE, world_size=ranks, rank=rank
    )
