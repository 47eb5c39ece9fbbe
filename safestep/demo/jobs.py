"""Layer 3, demo: run many experiments, each on one core, and show how long it still takes."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from safestep.demo.experiment import PROTECTIONS, Outcome, Spike, train
from safestep.demo.tasks import make_task


@dataclass(frozen=True, slots=True)
class Job:
    """One run: everything that decides its outcome.

    Attributes:
        task: Name of the task, see `make_task`.
        spike: What happens to the learning rate.
        protection: A key of ``PROTECTIONS``.
        seed: Seed of the model and of the order of the data.
    """

    task: str
    spike: Spike
    protection: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its run log lies, below the output folder."""
        return Path(self.task, self.spike.name, self.protection, f"seed-{self.seed}")


Outcomes = dict[Job, Outcome]

_steps_done: Any = None


def run_jobs(jobs: Iterable[Job], output: Path) -> Outcomes:
    """Run every job, as many at a time as torch would use threads, with a progress bar.

    One thread a run makes the numbers independent of the number of cores.

    Args:
        jobs: What to run.
        output: Folder for the run logs.

    Returns:
        The outcome of every job, in the order of the jobs.
    """
    jobs = list(jobs)
    context = get_context("spawn")  # torch's threads do not survive a fork
    steps_done = context.Value("l", 0)
    workers = min(len(jobs), torch.get_num_threads())
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (steps_done,)) as pool,
        Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(), TextColumn("left"),
        ) as progress,
    ):  # fmt: skip
        futures = [pool.submit(_run, job, output) for job in jobs]
        steps = sum(make_task(job.task).num_steps for job in jobs)
        bar = progress.add_task(f"{len(jobs)} runs", total=steps)
        running = set(futures)
        while running:
            running = wait(running, timeout=0.2).not_done
            progress.update(bar, completed=steps_done.value)
        return {job: future.result() for job, future in zip(jobs, futures, strict=True)}


def _start_worker(steps_done: Any) -> None:
    global _steps_done
    _steps_done = steps_done
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the traceback is the parent's to show


def _count_step() -> None:
    with _steps_done.get_lock():
        _steps_done.value += 1


def _run(job: Job, output: Path) -> Outcome:
    return train(
        make_task(job.task),
        job.spike,
        PROTECTIONS[job.protection],
        seed=job.seed,
        run_dir=output / job.folder,
        on_step=_count_step,
    )
