"""The files of a run directory: ``run.jsonl`` is the newest run, ``run-<id>.jsonl`` another.

A new run never touches the records of an earlier one: the earlier file is renamed, and a process
that still writes to it goes on writing to it under its new name.
"""

import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safestep.runlog.record import check_header

FILE_NAME = "run.jsonl"
MAX_HEADER_BYTES = 1 << 20
_ID = re.compile(r"[\w.-]{1,64}")  # a log is untrusted, and an id becomes a file name


@dataclass(frozen=True, slots=True)
class RunFile:
    """One run of a directory.

    Attributes:
        path: Its file.
        run: Its id, None in a log of an earlier version of safestep.
        started: When it began, ISO 8601 in UTC; "" if the log does not say.
        header: The first line of its file.
    """

    path: Path
    run: str | None
    started: str
    header: dict[str, Any]


def new_run_id() -> str:
    """Return an id that sorts by time, such as "20260131-235959-5a1e3b"."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def list_runs(run_dir: str | Path) -> list[RunFile]:
    """Return the runs of a directory: the one in ``run.jsonl`` first, then the newest first.

    Args:
        run_dir: The directory.

    Returns:
        The runs; files that are no run logs are left out.

    Example:
        >>> import tempfile
        >>> from safestep.runlog.writer import RunLog
        >>> run_dir = tempfile.mkdtemp()
        >>> for step in range(2):
        ...     with RunLog(run_dir, {}) as log:
        ...         log.write("step", {"step": step})
        >>> newest, earlier = list_runs(run_dir)
        >>> newest.path.name, earlier.path.name == f"run-{earlier.run}.jsonl"
        ('run.jsonl', True)
    """
    found = [_read_entry(path) for path in sorted(Path(run_dir).glob("run*.jsonl"))]
    runs = [run for run in found if run is not None]
    return sorted(runs, key=lambda run: (run.path.name == FILE_NAME, run.started), reverse=True)


def check_ours(path: Path) -> None:
    """Check that a file may be replaced by a new run's: a run log, or the torn start of one.

    Args:
        path: The file; it need not be there.

    Raises:
        ValueError: If the file is not a run log, or one of a newer schema.
    """
    if os.path.lexists(path) and not _is_torn_header(line := _first_line(path)):
        check_header(line, path)


def show(path: Path) -> Path:
    """Give a run's file the name ``run.jsonl``; an earlier run there gets a name of its own.

    Args:
        path: The file of the run that was begun or resumed last.

    Returns:
        Where the file is now: unchanged where the system does not let it be renamed, as while
        another process of Windows has ``run.jsonl`` open.
    """
    shown = path.with_name(FILE_NAME)
    for _ in range(3):  # another process may be as quick
        if path == shown:
            break
        try:
            set_aside(shown)
            _rename_to_free_name(path, shown)
            return shown
        except FileExistsError:
            continue
        except (OSError, ValueError):
            break
    return path


def set_aside(shown: Path) -> Path | None:
    """Rename ``run.jsonl`` to ``run-<id>.jsonl``; remove it if it has not even a header.

    Args:
        shown: The file; it need not be there.

    Returns:
        The new path, if there was a run.
    """
    if not os.path.lexists(shown):
        return None
    line = _first_line(shown)
    if _is_torn_header(line):
        shown.unlink()
        return None
    target = shown.with_name(f"run-{_id_of(check_header(line, shown)) or new_run_id()}.jsonl")
    if os.path.lexists(target):
        target = target.with_name(f"{target.stem}-{secrets.token_hex(3)}.jsonl")
    _rename_to_free_name(shown, target)
    return target


def _rename_to_free_name(path: Path, target: Path) -> None:
    # Never over another file: a link fails where the name is taken.
    try:
        os.link(path, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        path.rename(target)
        return
    path.unlink()


def _read_entry(path: Path) -> RunFile | None:
    try:
        header = check_header(_first_line(path), path)
    except (OSError, ValueError):
        return None
    started = header.get("started")
    return RunFile(path, _id_of(header), started if isinstance(started, str) else "", header)


def _first_line(path: Path) -> bytes:
    if not path.is_file():  # a pipe would wait for a writer
        return b"?"
    with path.open("rb") as file:
        return file.readline(MAX_HEADER_BYTES)


def _is_torn_header(line: bytes) -> bool:
    start = b'{"kind": "header"'
    return not line.endswith(b"\n") and line.startswith(start[: len(line)])


def _id_of(header: dict[str, Any]) -> str | None:
    run = header.get("run")
    return run if isinstance(run, str) and _ID.fullmatch(run) else None
