"""Read a run back, from ``run.jsonl`` or a Lightning ``metrics.csv``, as numpy columns."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safestep._warn import warn_user
from safestep.runlog.columns import ColumnBuilder
from safestep.runlog.lightning_csv import read_metrics_csv
from safestep.runlog.writer import FILE_NAME, check_header

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a run left behind.

    Attributes:
        path: The file it was read from.
        header: The first line of the log: versions, ``world_size``, ``settings``; and ``logits``,
            the line that says which were found, once a step was measured.
        steps: One column a field of StepReport, and any other key of a step record. Shape
            ``[T]``; float64 (NaN where a record lacks the key), ``step`` int64, text object.
        workers: Scalars ``[T]`` and per-worker columns ``[T, N]``, NaN where missing.
        events: The event records, in the order of the file.
        torn: Whether the last line was cut short by a kill, and therefore skipped.
    """

    path: Path
    header: dict[str, Any]
    steps: Columns
    workers: Columns
    events: list[dict[str, Any]]
    torn: bool = False

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column of the steps: ``run["radius"]`` is ``run.steps["radius"]``.

        Args:
            name: Name of the column.

        Returns:
            The column. Shape ``[T]``.

        Raises:
            KeyError: If the log has no such column.
        """
        if name not in self.steps:
            raise KeyError(f"{name!r}: the steps have the columns {', '.join(sorted(self.steps))}")
        return self.steps[name]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of all writers, the later over the earlier."""
        merged: dict[str, Any] = {}
        for record in (self.header, *self.events):
            settings = record.get("settings")
            if isinstance(settings, dict):
                merged.update(settings)
        return merged


def read_run(path: str | Path) -> Run:
    """Read a run, finished or still going on.

    Steps that a resumed run took again (it went on from a checkpoint older than the kill) count
    once, as they were taken last.

    Args:
        path: A run directory, a ``run.jsonl``, a ``metrics.csv`` of Lightning's CSVLogger with
            safestep's logged names, or the directory that holds it.

    Returns:
        The run as numpy columns.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the file is empty, is not a run log, is one of a newer schema, or holds a
            line that is no record.

    Example:
        >>> import tempfile
        >>> from safestep.runlog.writer import RunLog
        >>> run_dir = tempfile.mkdtemp()
        >>> with RunLog(run_dir, {}) as log:
        ...     log.write("step", {"step": 0, "radius": float("inf")})
        >>> read_run(run_dir).steps["radius"]
        array([inf])
    """
    file = _find_file(Path(path))
    if file.stat().st_size == 0:
        raise ValueError(
            f"read_run: expected a run log, got the empty file {file}. "
            "The run was killed before its first record, or has not begun."
        )
    if file.suffix == ".csv":
        header, steps, workers = read_metrics_csv(file)
        return Run(file, header, steps, workers, events=[])
    return _read_jsonl(file)


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    names = (FILE_NAME, "metrics.csv")
    for name in names:
        if (path / name).is_file():
            return path / name
    if not path.is_dir():
        raise FileNotFoundError(
            f"read_run: expected `path` to be a run directory or file, got {path}, "
            "which is not there. Check the run_dir of the run."
        )
    below = sorted(str(file.parent) for name in names for file in path.glob(f"*/**/{name}"))
    hint = f"Runs lie below it: {', '.join(below[:5])}." if below else "Give a run's directory."
    raise FileNotFoundError(
        f"read_run: expected {' or '.join(names)} in `path`, got {path}. {hint}"
    )


def _read_jsonl(path: Path) -> Run:
    steps, workers = ColumnBuilder(path), ColumnBuilder(path)
    events: list[dict[str, Any]] = []
    torn = False
    with path.open("rb") as file:
        header = check_header(file.readline(), path)
        for number, record in _records(file, path):
            kind = record.pop("kind", None)
            if kind == "torn":
                torn = True
            elif kind == "step":
                steps.add(record, number)
            elif kind == "workers":
                workers.add(record, number)
            elif kind == "event":
                events.append(record)
                if record.get("name") == "logits":
                    header.setdefault("logits", record.get("message"))
                if record.get("name") == "resumed":
                    steps.start_segment()
                    workers.start_segment()
    if torn:
        warn_user(f"read_run: skipped the torn last line of {path}.")
    return Run(path, header, steps.build(), workers.build(), events, torn)


def _records(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # A torn last line is a record of kind "torn".
    for number, line in enumerate(lines, start=2):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield number, record
        elif not line.endswith(b"\n"):
            yield number, {"kind": "torn"}
        else:
            raise ValueError(
                f"read_run: expected a JSON object in line {number} of {path}, "
                f"got {line[:60]!r}. Remove the line to read the rest."
            )
