"""A run that is being written: which file it is in, and the records that wait to get there."""

from __future__ import annotations

import logging
import os
import weakref
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safestep._warn import warn_user
from safestep.runlog.folder import FILE_NAME, list_runs, new_run_id, show
from safestep.runlog.locked_file import LockedFile
from safestep.runlog.record import encode, line_of, make_header
from safestep.runlog.waiting import WaitingRecords

_logger = logging.getLogger("safestep")

_PATIENCE = 16  # records from one attempt to the next, after a write failed


class OpenRun:
    """A run that one or several writers of this process write.

    Args:
        directory: The run directory.
        world_size: Number of workers of the run.

    Attributes:
        path: The run's file; before the first record, where it will be.
        id: Id of the run.
        writers: Those that are open.
        has_begun: Whether the run has a file.
    """

    def __init__(self, directory: Path, world_size: int) -> None:
        self.path = directory / FILE_NAME
        self.id = new_run_id()
        self.writers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.has_begun = False
        self._owners: set[int] | None = set()
        self._world_size = world_size
        self._settings: dict[str, Any] = {}
        self._is_resumed = False  # the id is a checkpoint's
        self._ends_in_resumed = False  # the last line says that the run goes on
        self._is_over = False  # another writer of this process continues this run
        self._file: LockedFile | None = None
        self._deleted: LockedFile | None = None  # its content is there while it is open
        self._waiting = WaitingRecords()
        self._is_failing = False  # since a write failed
        self._pause = 0  # records to come before the next attempt
        _runs.add(self)

    @staticmethod
    def joinable(directory: Path, owners: set[int] | None) -> OpenRun | None:
        """Return the run of a directory that has not begun and has an owner in common."""
        for run in _runs:
            is_open = run.path.parent == directory and run.writers and not run.has_begun
            if is_open and (owners is None or run._owners is None or owners & run._owners):
                return run
        return None

    def join(self, writer: object, settings: dict[str, Any], owners: set[int] | None) -> None:
        """Let a writer in.

        Args:
            writer: It.
            settings: What it was asked to do.
            owners: Ids of the objects whose run this is; None joins any run.
        """
        self.writers.add(writer)
        self._settings.update(settings)
        both = None if owners is None or self._owners is None else owners | self._owners
        self._owners = both

    def leave(self, writer: object) -> None:
        """Let a writer go; the last one closes the file."""
        is_last = set(self.writers) == {writer}
        self.writers.discard(writer)
        if not is_last:
            return
        # A run without a step is a run, unless one is shown.
        is_empty = not self.has_begun and not os.path.lexists(self.path)
        if self._waiting or is_empty:
            self._write_waiting()
        if count := len(self._waiting) + self._waiting.num_lost:
            warn_user(
                f"safestep: the last {count} records could not be written to {self.path} and are "
                "lost."
            )
        self.close()

    def resume(self, run: str) -> None:
        """Go on with the run of a checkpoint.

        Args:
            run: Its id.
        """
        self._is_over = False
        if self.has_begun and run == self.id:
            if not self._ends_in_resumed:
                self._add("event", self._resumed)
                self._ends_in_resumed = True
            return
        self.close()
        self._waiting.clear()
        self.id, self.has_begun, self._is_resumed = run, False, True

    def append(self, kind: str, record: dict[str, Any]) -> None:
        """Write a record, now or when that is possible.

        Args:
            kind: Its kind.
            record: The rest of it.
        """
        if self._is_over:
            return
        try:
            body = encode(record)
        except (ValueError, TypeError, RecursionError) as error:
            warn_user(f"safestep: a record could not be written to {self.path}: {error}.")
            return
        self._add(kind, body)

    def close(self) -> None:
        """Close the file, which releases its lock."""
        for file in filter(None, (self._file, self._deleted)):
            file.close()
        self._file = self._deleted = None

    def begin_anew(self) -> None:
        """Leave the file to the process that this one was forked from."""
        self.close()
        self._waiting.clear()
        self.id, self.has_begun = new_run_id(), False

    def _add(self, kind: str, body: bytes) -> None:
        self._waiting.add(kind, body)
        self._pause = max(0, self._pause - 1)
        if not self._pause:
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the records that wait; where that fails, they wait on."""
        try:
            file = self._opened()
            while self._waiting:
                kind, body = self._waiting.first()
                file.append(line_of(kind, self.id, body))
                self._waiting.pop()
            self._ends_in_resumed = False
            if self._is_failing:
                self._say_gap(file)
        except OSError as error:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._pause = _PATIENCE
            if not self._is_failing:
                self._is_failing = True
                warn_user(
                    f"safestep: no more records in {self.path}: {error}. Training goes on. The "
                    "latest records are kept in memory, and written when they can be."
                )

    def _opened(self) -> LockedFile:
        # The file in use, the one that the run had, or a new one.
        if self._file is not None:
            if self._file.is_deleted:
                self._deleted, self._file = self._file, None
                raise OSError("the file was deleted")
            return self._file
        directory = self.path.parent
        if not self.has_begun:
            directory.mkdir(parents=True, exist_ok=True)
        elif not directory.is_dir():  # waited for, not made again
            raise FileNotFoundError(f"{directory} is not there")
        may_be_there = self.has_begun or self._is_resumed
        found = self._found(directory) if may_be_there else None
        file = found or self._created(directory)
        self.close()  # what was deleted
        self._file = file
        if self._is_resumed and not (self.has_begun and found):
            file.append(line_of("event", self.id, self._resumed))
        self.has_begun = True
        self._show(directory)
        return file

    def _found(self, directory: Path) -> LockedFile | None:
        """Return the file that the run has, None without or if another process writes to it."""
        found = next((run.path for run in list_runs(directory) if run.run == self.id), None)
        if found is None:
            return None
        for run in _runs:  # a guard that nobody detached: this one goes on in its place
            if run is not self and run.id == self.id:
                run.close()
                run._is_over = True
        file = LockedFile(found, is_new=False)
        if not file.is_ours:
            file.close()
            _logger.info(
                "run %s is still being written by another process: this one begins a run of its "
                "own", self.id,
            )  # fmt: skip
            self._begin_another()
            self._is_resumed = False
            return None
        self.path = found
        file.cut_torn_line()
        return file

    def _created(self, directory: Path) -> LockedFile:
        self.path = directory / f"run-{self.id}.jsonl"
        if os.path.lexists(self.path):  # not ours, or we would have resumed it
            self._begin_another()
            self.path = directory / f"run-{self.id}.jsonl"
        file = LockedFile(self.path, is_new=True)
        started = datetime.now(timezone.utc).isoformat()
        try:
            if self._deleted is not None:
                file.append_all_of(self._deleted)
            else:
                file.append(make_header(self.id, started, self._world_size, self._settings))
        except OSError:
            file.close()
            self.path.unlink(missing_ok=True)  # no file without a header
            raise
        return file

    def _begin_another(self) -> None:
        self.id = new_run_id()
        if self._deleted is not None:
            self._deleted.close()
            self._deleted = None

    def _show(self, directory: Path) -> None:
        """Make this the run that is shown, and note where that leaves the one shown before."""
        earlier = directory / FILE_NAME
        shown = show(self.path)
        for run in _runs:
            if run is not self and run.path == earlier and run.has_begun:
                run.path = directory / f"run-{run.id}.jsonl"
        self.path = shown
        if shown != earlier:
            warn_user(f"safestep: {earlier} is in use or no run log; this run is in {shown}.")

    @property
    def _resumed(self) -> bytes:
        record = {"name": "resumed", "message": "the run goes on", "settings": self._settings}
        return encode(record)

    def _say_gap(self, file: LockedFile) -> None:
        lost = self._waiting.num_lost
        message = f"the log could not be written for a while; {lost or 'no'} records are lost"
        file.append(line_of("event", self.id, encode({"name": "gap", "message": message})))
        self._waiting.clear()
        self._is_failing = False
        _logger.info("%s: %s", self.path, message)


_runs: weakref.WeakSet[OpenRun] = weakref.WeakSet()


def _leave_files_to_parent() -> None:
    for run in _runs:
        run.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_files_to_parent)
