"""Run many experiments, each on one core, and show how each is doing and how long is left."""

from __future__ import annotations

import heapq
import signal
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from safestep.demo.experiment import PROTECTIONS, Outcome, Spike, train
from safestep.demo.tasks import make_task

_TOLD = 20  # so many runs at most are told one by one when they end


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

    @property
    def title(self) -> str:
        """What the progress calls it, such as ``mlp, x10,000 held, plain``."""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.task}, {self.spike.title}, {PROTECTIONS[self.protection].title}{seed}"


Outcomes = dict[Job, Outcome]

_steps_done: Any = None  # of each job, shared with the parent
_accuracies: Any = None  # of each job in percent, NaN before the first


def run_jobs(jobs: Iterable[Job], output: Path) -> Outcomes:
    """Run every job, as many at a time as torch would use threads, and show how each is doing.

    One thread a run makes the numbers independent of the number of cores.

    Args:
        jobs: What to run.
        output: Folder for the run logs.

    Returns:
        The outcome of every job, in the order of the jobs.
    """
    jobs = list(jobs)
    context = get_context("spawn")  # torch's threads do not survive a fork
    steps_done = context.Array("l", len(jobs), lock=False)
    accuracies = context.Array("d", [float("nan")] * len(jobs), lock=False)
    workers = min(len(jobs), torch.get_num_threads())
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (steps_done, accuracies)) as pool,
        Progress(
            TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[note]}"),
        ) as progress,
    ):  # fmt: skip
        futures = [pool.submit(_run, place, job, output) for place, job in enumerate(jobs)]
        board = _Board(progress, jobs, workers)
        while True:
            board.show(futures, list(steps_done), list(accuracies))
            if not wait(futures, timeout=0.2).not_done:
                break
        board.show(futures, list(steps_done), list(accuracies))
        return {job: future.result() for job, future in zip(jobs, futures, strict=True)}


class _Board:
    """Show a bar for all runs and one for each that is going on, and a line for each that ended."""

    def __init__(self, progress: Progress, jobs: Sequence[Job], workers: int) -> None:
        self._progress, self._jobs, self._workers = progress, jobs, workers
        self._lengths = [make_task(job.task).num_steps for job in jobs]
        self._all = progress.add_task(_title(jobs), total=sum(self._lengths), note="")
        self._bars: dict[int, TaskID] = {}
        self._started: dict[int, float] = {}
        self._pace: dict[str, tuple[int, float]] = {}
        self._ended: set[int] = set()

    def show(self, futures: Sequence[Future], steps: list[int], accuracies: list[float]) -> None:
        """Update what is shown from the steps done and the last accuracy of each job."""
        for place, job in enumerate(self._jobs):
            if place in self._ended or not steps[place]:
                continue
            if place not in self._bars:
                self._started[place] = time.monotonic()
                self._bars[place] = self._progress.add_task(
                    f"  {job.title}", total=self._lengths[place], note=""
                )
            note = f"test {accuracies[place]:.1f} %" if accuracies[place] >= 0 else ""
            self._progress.update(self._bars[place], completed=steps[place], note=note)
            self._pace[job.task] = (steps[place] - 1, time.monotonic() - self._started[place])
            if futures[place].done():
                self._end(place, note)
        left = [length - done for length, done in zip(self._lengths, steps, strict=True)]
        self._progress.update(self._all, completed=sum(steps), note=self._time_left(left))

    def _end(self, place: int, note: str) -> None:
        self._ended.add(place)
        self._progress.remove_task(self._bars.pop(place))
        if len(self._jobs) <= _TOLD:
            self._progress.console.print(f"{self._jobs[place].title}: {note}", highlight=False)

    def _time_left(self, left: list[int]) -> str:
        paces = {task: seconds / steps for task, (steps, seconds) in self._pace.items() if steps}
        if not any(left) or not paces:
            return "" if not any(left) else "starting"
        slowest = max(paces.values())
        loads = [
            steps * paces.get(job.task, slowest)
            for job, steps in zip(self._jobs, left, strict=True)
        ]
        return f"about {_minutes(makespan(loads, self._workers))} left"


def makespan(loads: Sequence[float], workers: int) -> float:
    """Return when the last of some workers is done that take jobs in order, each as it gets free.

    Args:
        loads: Seconds that each job takes.
        workers: Number of workers.

    Returns:
        Seconds.

    Example:
        >>> makespan([3.0, 1.0, 1.0, 4.0], workers=2)
        6.0
    """
    free = [0.0] * workers
    for load in loads:
        heapq.heappush(free, heapq.heappop(free) + load)
    return max(free)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _title(jobs: Sequence[Job]) -> str:
    return f"{len(jobs)} run{'s' * (len(jobs) != 1)}"


def _start_worker(steps_done: Any, accuracies: Any) -> None:
    global _steps_done, _accuracies
    _steps_done, _accuracies = steps_done, accuracies
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the traceback is the parent's to show


def _run(place: int, job: Job, output: Path) -> Outcome:
    def on_step(outcome: Outcome) -> None:
        _steps_done[place] += 1
        if outcome.accuracies:
            _accuracies[place] = outcome.accuracies[-1]["test"]

    return train(
        make_task(job.task),
        job.spike,
        PROTECTIONS[job.protection],
        seed=job.seed,
        run_dir=output / job.folder,
        on_step=on_step,
    )
