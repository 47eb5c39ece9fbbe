"""Write the inputs of steps that went wrong into files beside the run log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safestep._warn import warn_user
from safestep.capture.call import Call
from safestep.parallel.ranks import Ranks
from safestep.parallel.shards import local


class KeptBatches:
    """Write at most so many files ``batch-<run>-step<step>.pt``, on several ranks one each.

    ``torch.load(file, weights_only=True)`` gives a dict: "run", "step", "rank", "reason" and
    "calls", a list with the "args" and "kwargs" of each forward call. Tensors are on the CPU;
    numbers and texts are as they were, tuples are lists, and of anything else there is its repr.

    Args:
        run_dir: The folder of the run log.
        count: How many files at most, on each rank.
        ranks: The ranks, each of which has a batch of its own.
    """

    def __init__(self, run_dir: str | Path | None, count: int, ranks: Ranks) -> None:
        self._run_dir, self._left, self._ranks = run_dir, count, ranks

    def keep(self, run: str | None, step: int, reason: str, calls: Sequence[Call]) -> str | None:
        """Write the inputs of a step; every rank must call this at the same steps.

        Args:
            run: Id of the run, on the rank that writes the log.
            step: The step's number.
            reason: What is wrong with it.
            calls: Its forward calls.

        Returns:
            The name of the file, None if none was written.
        """
        if self._left <= 0 or self._run_dir is None:
            return None
        self._left -= 1
        ranks = self._ranks
        if ranks.size > 1:
            run = ranks.gather_texts(run, "the id of its run")[0]
        own = f"-rank{ranks.index}" if ranks.size > 1 else ""
        path = Path(self._run_dir) / f"batch-{run}-step{step}{own}.pt"
        found = {"run": run, "step": step, "rank": ranks.index, "reason": reason}
        inputs = [dict(zip(("args", "kwargs"), call.arguments, strict=True)) for call in calls]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**found, "calls": _plain(inputs)}, path)
        except Exception as error:  # such as a full disk
            self._left = 0
            warn_user(f"SafeStep: no more batches are kept: {path} could not be written ({error}).")
            return None
        return path.name


def _plain(value: Any) -> Any:
    """Return a value as what ``torch.load`` reads without running code."""
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    return value if value is None or type(value) in (bool, int, float, str) else repr(value)
