"""Write a run's records to ``run.jsonl``, one JSON object a line, as training goes on.

The file is made to outlive the process. Its first line is a header (``kind`` "header"); every other
line is one record with its ``kind``: "step" (the fields of StepReport), "workers" (per-worker
lists beside scalars) or "event" (``name``, ``message``). Each line is strict JSON: JSON has no
number for NaN and infinities, so they are the strings "nan", "inf" and "-inf", which ``float``
and its like in other languages parse. ``safestep.read_run`` reads it back.
"""

import json
import math
import os
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from safestep._warn import warn_user

SCHEMA_VERSION = 1
FILE_NAME = "run.jsonl"
KINDS = ("step", "workers", "event")
_MAX_HEADER_BYTES = 1 << 20

_open_logs: "weakref.WeakSet[RunLog]" = weakref.WeakSet()


class RunLog:
    """Append records to ``run_dir/run.jsonl``; a killed process loses at most the last line.

    The first writer of a file makes its header. Any later one leaves it as it is and appends an
    event with its own settings: "joined" while another writer of this process has the file
    open (two callbacks with one run directory), "resumed" otherwise. A line torn by a kill is cut
    off when a run resumes. Logging never ends a training run: when a write fails (a full disk),
    it warns once and logs no more.

    Args:
        run_dir: Directory of the run; made if it is not there.
        settings: What the writer was asked to do, kept in the header or in its event.
        world_size: Number of workers of the run.

    Raises:
        ValueError: If the file there is not a run log, or one of a newer schema.

    Example:
        >>> import tempfile
        >>> run_dir = tempfile.mkdtemp()
        >>> with RunLog(run_dir, {"action": "clip"}) as log:
        ...     log.write("step", {"step": 0, "normalized_step": 0.25, "radius": float("inf")})
        >>> print(log.path.read_text().splitlines()[1])
        {"kind": "step", "step": 0, "normalized_step": 0.25, "radius": "inf"}
    """

    def __init__(self, run_dir: str | Path, settings: dict[str, Any], world_size: int = 1) -> None:
        self.path = Path(run_dir).resolve() / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_joining = any(log.path == self.path for log in _open_logs)
        is_new = _prepare(self.path)
        self._file: BinaryIO | None = self.path.open("ab", buffering=0)
        _open_logs.add(self)
        if is_new:
            self._append({**_header(world_size), "settings": settings})
        else:
            name = "joined" if is_joining else "resumed"
            message = "another writer shares this log" if is_joining else "the run goes on"
            self.write("event", {"name": name, "message": message, "settings": settings})

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append one record, handed to the system before the call returns.

        Args:
            kind: "step", "workers" or "event".
            record: JSON values, numpy or torch scalars and arrays among them.

        Raises:
            ValueError: If the kind is unknown.
            RuntimeError: If the log was closed.
        """
        if kind not in KINDS:
            raise ValueError(f"RunLog.write: expected `kind` in {KINDS}, got {kind!r}. Use one.")
        if self not in _open_logs:
            raise RuntimeError(
                "RunLog.write: expected an open log, got a closed one. Make a new RunLog."
            )
        self._append({"kind": kind, **record})

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        _open_logs.discard(self)
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is None:  # an earlier write failed
            return
        try:
            # One write for the whole line: lines of two writers never mix.
            line = encode(record) + b"\n"
            if self._file.write(line) != len(line):
                raise OSError("the last record was written in part")
        except OSError as error:
            self._file.close()
            self._file = None
            warn_user(
                f"safestep: no more records in {self.path}: {error}. Training goes on unlogged."
            )


def encode(record: dict[str, Any]) -> bytes:
    """Return the record as one line of strict ASCII JSON, without the newline.

    Args:
        record: JSON values, non-finite floats, numpy or torch scalars and arrays.

    Returns:
        The line. Non-finite numbers are the strings "nan", "inf" and "-inf".

    Example:
        >>> encode({"loss": [1.5, float("nan")]})
        b'{"loss": [1.5, "nan"]}'
    """
    try:
        return json.dumps(record, allow_nan=False).encode()
    except (ValueError, TypeError):  # the common record needs no walk through its values
        return json.dumps(_jsonable(record), allow_nan=False).encode()


def check_header(line: bytes, path: Path) -> dict[str, Any]:
    """Return the header in a log's first line.

    Args:
        line: The first line of the file.
        path: The file, for the error.

    Returns:
        The header as a dict, ``schema_version`` and ``settings`` among its keys.

    Raises:
        ValueError: If the line is no header, or one of a newer schema.
    """
    try:
        header = json.loads(line.decode())
    except (ValueError, RecursionError):
        header = None
    version = header.get("schema_version") if isinstance(header, dict) else None
    if not isinstance(header, dict) or header.get("kind") != "header" or type(version) is not int:
        raise ValueError(
            f"run log: expected a safestep header in the first line of {path}, "
            f"got {line[:60]!r}. Give a run directory that safestep wrote."
        )
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"run log: expected schema version <= {SCHEMA_VERSION} in {path}, got {version}. "
            "Update safestep: a newer version wrote this log."
        )
    return header


def _header(world_size: int) -> dict[str, Any]:
    return {
        "kind": "header",
        "schema_version": SCHEMA_VERSION,
        "safestep": _version("safestep"),
        "torch": _version("torch"),
        "world_size": world_size,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a bare checkout on the path
        return None


def _prepare(path: Path) -> bool:
    """Return whether the file still needs a header; a torn last line is cut off."""
    if not path.exists():
        return True
    with path.open("r+b") as file:
        first_line = file.readline(_MAX_HEADER_BYTES)
        if not first_line.endswith(b"\n"):
            if not first_line.startswith(b'{"kind": "header"'[: len(first_line)]):
                check_header(first_line, path)  # not ours: raises rather than cutting it off
            file.truncate(0)
            return True
        check_header(first_line, path)
        _cut_torn_line(file)
    return False


def _cut_torn_line(file: BinaryIO) -> None:
    end = file.seek(0, os.SEEK_END)
    while True:  # back, block by block, to the end of the last whole line
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            file.truncate(start + newline + 1)
            return
        end = start


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _jsonable(value.tolist())
    return str(value)
