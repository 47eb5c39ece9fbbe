"""Write a run's records to ``run.jsonl``, one JSON object a line, as training goes on.

The file is made to outlive the process. Its first line is a header (``kind`` "header"); every other
line is one record with its ``kind`` and the id of its ``run``: "step" (the fields of StepReport),
"workers" (per-worker lists beside scalars), "micro" (per-worker lists of one micro-batch of a step)
or "event" (``name``, ``message``). Each line is strict JSON: JSON has no number for NaN and
infinities, so they are the strings "nan", "inf" and "-inf", which ``float`` and its like in other
languages parse. ``safestep.read_run`` reads it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safestep.runlog.folder import FILE_NAME, check_ours
from safestep.runlog.open_run import OpenRun
from safestep.runlog.record import KINDS


class RunLog:
    """Append the records of one run to ``run_dir/run.jsonl``.

    **One file, one run.** A run begins with its first record. Where ``run.jsonl`` holds an earlier
    run, that one becomes ``run-<id>.jsonl``: the newest run is shown, the earlier is still there,
    and whoever still writes to it goes on writing to it. So a script that runs again, a cell that
    runs twice and a second process each get a file of their own.

    **Shared.** Writers of one process that are made before either has written share a run, if they
    name an object in common in `owners` (the parameters they train) or one of them names none: two
    callbacks, or the guards of a model's two optimizers.

    **Resumed.** `resume` with the id that a checkpoint kept goes on in the file of that run, and
    only that does. If another process still writes to it, this one begins a run of its own.

    A killed process loses at most the last line, which is cut off when the run is resumed. Logging
    never ends training: when a write fails (a full disk, a deleted directory), it warns once, keeps
    the last 8 MiB of records and writes them when it can, with an event that says what was lost. A
    directory that was deleted is waited for, not made again; the earlier records are then written
    there too.

    Args:
        run_dir: Directory of the run; made if it is not there.
        settings: What the writer was asked to do, for the header.
        world_size: Number of workers of the run.
        owners: Objects whose run this is; None joins any run that has not begun.

    Raises:
        ValueError: If the folder cannot be made, or if ``run.jsonl`` is there and no run log, or
            one of a newer schema.

    Example:
        >>> import tempfile
        >>> run_dir = tempfile.mkdtemp()
        >>> with RunLog(run_dir, {"action": "clip"}) as log:
        ...     log.write("step", {"step": 0, "normalized_step": 0.25, "radius": float("inf")})
        >>> from safestep import read_run
        >>> read_run(run_dir)["radius"], read_run(run_dir).header["run"] == log.run
        (array([inf]), True)
    """

    def __init__(
        self,
        run_dir: str | Path,
        settings: dict[str, Any],
        world_size: int = 1,
        *,
        owners: Iterable[object] | None = None,
    ) -> None:
        directory = Path(run_dir).resolve()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"RunLog: expected `run_dir` to be a folder that can be made, got {directory} "
                f"({error.strerror}). Give another folder, or None for no log."
            ) from error
        check_ours(directory / FILE_NAME)
        ids = None if owners is None else {id(owner) for owner in owners}
        self._run = OpenRun.joinable(directory, ids) or OpenRun(directory, world_size)
        self._run.join(self, settings, ids)

    @property
    def path(self) -> Path:
        """The run's file; before the first record, where it will be."""
        return self._run.path

    @property
    def run(self) -> str:
        """Id of the run."""
        return self._run.id

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append one record, handed to the system before the call returns.

        Args:
            kind: "step", "workers", "micro" or "event".
            record: JSON values, numpy or torch scalars and arrays among them.

        Raises:
            ValueError: If the kind is unknown.
            RuntimeError: If the log was closed.
        """
        if kind not in KINDS:
            raise ValueError(f"RunLog.write: expected `kind` in {KINDS}, got {kind!r}. Use one.")
        if self not in self._run.writers:
            raise RuntimeError(
                "RunLog.write: expected an open log, got a closed one. Make a new RunLog."
            )
        self._run.append(kind, record)

    def resume(self, run: str | None) -> None:
        """Go on with the run of a checkpoint; steps taken again supersede the earlier ones.

        Args:
            run: Its id, as `run` gave it. None, which a state without a log has, does nothing.
        """
        if run is not None and self in self._run.writers:
            self._run.resume(run)

    def close(self) -> None:
        """Close the log; closing again does nothing."""
        self._run.leave(self)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
