"""Write a run's records to ``run.jsonl``, one JSON object a line, as training goes on.

The file is made to outlive the process. Its first line is a header (``kind`` "header"); every other
line is one record with its ``kind`` and the id of its ``run``: "step" (the fields of StepReport),
"workers" (per-worker lists beside scalars), "micro" (per-worker lists of one micro-batch of a step)
or "event" (``name``, ``message``). Each line is strict JSON: JSON has no number for NaN and
infinities, so they are the strings "nan", "inf" and "-inf", which ``float`` and its like in other
languages parse. ``safestep.read_run`` reads it back.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safestep._warn import warn_user
from safestep.runlog import folder as run_folder
from safestep.runlog.folder import FILE_NAME
from safestep.runlog.record import KINDS, encode, line_of, make_header
from safestep.runlog.waiting import WaitingRecords

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be renamed there, so runs do not mix either
    fcntl = None

_logger = logging.getLogger("safestep")

_PATIENCE = 16  # records from one attempt to the next, after a write failed


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
    directory that was deleted is waited for, not made again.

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
        run_folder.check_ours(directory / FILE_NAME)
        ids = None if owners is None else {id(owner) for owner in owners}
        self._writing = _joinable(directory, ids) or _Writing(directory, world_size)
        self._writing.join(self, settings, ids)

    @property
    def path(self) -> Path:
        """The run's file; before the first record, where it will be."""
        return self._writing.path

    @property
    def run(self) -> str:
        """Id of the run."""
        return self._writing.run

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
        if self not in self._writing.writers:
            raise RuntimeError(
                "RunLog.write: expected an open log, got a closed one. Make a new RunLog."
            )
        self._writing.append(kind, record)

    def resume(self, run: str | None) -> None:
        """Go on with the run of a checkpoint; steps taken again supersede the earlier ones.

        Args:
            run: Its id, as `run` gave it. None, which a state without a log has, does nothing.
        """
        if run is not None and self in self._writing.writers:
            self._writing.resume(run)

    def close(self) -> None:
        """Close the log; closing again does nothing."""
        self._writing.leave(self)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Writing:
    """A run that is being written, by one or several writers of this process."""

    def __init__(self, directory: Path, world_size: int) -> None:
        self.path = directory / FILE_NAME
        self.run = run_folder.new_run_id()
        self.writers: weakref.WeakSet[RunLog] = weakref.WeakSet()
        self.owners: set[int] | None = set()
        self.has_begun = False
        self._world_size = world_size
        self._settings: dict[str, Any] = {}
        self._is_resumed = False
        self._last_is_resumed = False
        self._fd = -1
        self._closing: weakref.finalize | None = None
        self._waiting = WaitingRecords()
        self._num_tries = 0  # records since a write failed, 0 if none did
        self._is_over = False  # another writer of this process continues this run
        _runs.add(self)

    def join(self, writer: RunLog, settings: dict[str, Any], owners: set[int] | None) -> None:
        self.writers.add(writer)
        self._settings.update(settings)
        both = None if owners is None or self.owners is None else owners | self.owners
        self.owners = both

    def leave(self, writer: RunLog) -> None:
        is_last = set(self.writers) == {writer}
        if is_last and not self.has_begun and not os.path.lexists(self.path):
            self._safely(self._begin)  # a run without a step is a run, unless one is shown
        self.writers.discard(writer)
        if is_last:
            self._write_the_last()
            self.close()

    def resume(self, run: str) -> None:
        self._is_over = False
        if self.has_begun and run == self.run:
            if not self._last_is_resumed:
                self._append("event", self._resumed)
                self._last_is_resumed = True
            return
        self.close()
        self._waiting.clear()
        self.run, self.has_begun, self._is_resumed = run, False, True

    def append(self, kind: str, record: dict[str, Any]) -> None:
        if self._is_over:
            return
        try:
            self._append(kind, encode(record))
        except (ValueError, TypeError, RecursionError) as error:
            warn_user(f"safestep: a record could not be written to {self.path}: {error}.")

    def close(self) -> None:
        """Close the file, which releases its lock."""
        if self._closing is not None:
            self._closing()
            self._closing, self._fd = None, -1

    def begin_anew(self) -> None:
        """Leave the file to the process that this one was forked from."""
        self.close()
        self._waiting.clear()
        self.run, self.has_begun = run_folder.new_run_id(), False

    def _safely(self, function: Any, *args: Any) -> None:
        try:
            function(*args)
        except OSError as error:
            self.close()
            if not self._num_tries:
                self._num_tries = 1
                warn_user(
                    f"safestep: no more records in {self.path}: {error}. Training goes on. The "
                    "latest records are kept in memory, and written when they can be."
                )
        except (ValueError, TypeError, RecursionError) as error:
            warn_user(f"safestep: a record could not be written to {self.path}: {error}.")

    def _append(self, kind: str, body: bytes) -> None:
        self._waiting.add(kind, body)
        self._num_tries += self._num_tries > 0
        if self._num_tries % _PATIENCE == 0:
            self._safely(self._write_waiting)

    def _write_waiting(self) -> None:
        if not self.has_begun:
            self._begin()
        elif self._closing is None:
            self._go_on()
        elif os.fstat(self._fd).st_nlink == 0:
            raise OSError("the file was deleted")
        while self._waiting:
            self._write(line_of(self._waiting.first()[0], self.run, self._waiting.first()[1]))
            self._waiting.pop()
        self._last_is_resumed = False
        if self._num_tries:
            self._say_gap()

    def _write_the_last(self) -> None:
        if self._waiting:
            self._safely(self._write_waiting)
        if count := len(self._waiting) + self._waiting.num_lost:
            warn_user(
                f"safestep: the last {count} records could not be written to {self.path} and are "
                "lost."
            )

    def _write(self, line: bytes) -> None:
        # One write for the whole line: a reader never sees the lines of two writers mixed.
        if os.write(self._fd, line) != len(line):
            raise OSError("the last record was written in part")

    def _begin(self) -> None:
        directory = self.path.parent
        directory.mkdir(parents=True, exist_ok=True)
        if self._is_resumed and self._reopen(directory):
            self._say_resumed()
        else:
            self._create(directory)
        self.has_begun = True
        self._show()

    def _go_on(self) -> None:
        directory = self.path.parent
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not there")
        if not self._reopen(directory):
            self._create(directory)
        self._show()

    def _show(self) -> None:
        directory = self.path.parent
        earlier = directory / FILE_NAME
        shown = run_folder.show(self.path)
        for run in _runs:
            if run is not self and run.path == earlier and run.has_begun:
                run.path = directory / f"run-{run.run}.jsonl"
        self.path = shown
        if shown != earlier:
            warn_user(f"safestep: {earlier} is in use or no run log; this run is in {shown}.")

    def _reopen(self, directory: Path) -> bool:
        # False where there is no such file, or another process still writes to it.
        found = next((r for r in run_folder.list_runs(directory) if r.run == self.run), None)
        if found is None:
            return False
        for run in _runs:  # a guard that nobody detached: this one goes on in its place
            if run is not self and run.run == self.run:
                run.close()
                run._is_over = True
        self._open(found.path, os.O_RDWR | os.O_APPEND)
        if not self._lock():
            self.close()
            _logger.info(
                "run %s is still being written by another process: this one begins a run of its "
                "own", self.run,
            )  # fmt: skip
            self.run, self._is_resumed = run_folder.new_run_id(), False
            return False
        self.path = found.path
        run_folder.cut_torn_line(self._fd)
        return True

    def _create(self, directory: Path) -> None:
        self.path = directory / f"run-{self.run}.jsonl"
        if os.path.lexists(self.path):  # not ours, or we would have resumed it
            self.run = run_folder.new_run_id()
            self.path = directory / f"run-{self.run}.jsonl"
        self._open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        self._lock()
        started = datetime.now(timezone.utc).isoformat()
        try:
            self._write(make_header(self.run, started, self._world_size, self._settings))
        except OSError:
            self.path.unlink(missing_ok=True)  # no file without a header
            raise
        if self._is_resumed:
            self._say_resumed()

    @property
    def _resumed(self) -> bytes:
        record = {"name": "resumed", "message": "the run goes on", "settings": self._settings}
        return encode(record)

    def _say_resumed(self) -> None:
        self._write(line_of("event", self.run, self._resumed))
        self._last_is_resumed = True

    def _say_gap(self) -> None:
        lost = self._waiting.num_lost
        message = f"the log could not be written for a while; {lost or 'no'} records are lost"
        self._write(line_of("event", self.run, encode({"name": "gap", "message": message})))
        self._waiting.clear()
        self._num_tries = 0
        _logger.info("%s: %s", self.path, message)

    def _open(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
        self._closing = weakref.finalize(self, os.close, self._fd)

    def _lock(self) -> bool:
        # It ends with the process. False if another process has it.
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True


_runs: weakref.WeakSet[_Writing] = weakref.WeakSet()


def _joinable(directory: Path, owners: set[int] | None) -> _Writing | None:
    """Return the run of this directory that has not begun and has an owner in common."""
    for run in _runs:
        if run.path.parent != directory or run.has_begun or not run.writers:
            continue
        if owners is None or run.owners is None or owners & run.owners:
            return run
    return None


def _leave_files_to_parent() -> None:
    for run in _runs:
        run.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_files_to_parent)
