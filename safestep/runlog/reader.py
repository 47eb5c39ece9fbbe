"""Read a run back, from ``run.jsonl`` or a Lightning ``metrics.csv``, as numpy columns."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from safestep._warn import warn_user
from safestep.runlog.columns import ColumnBuilder
from safestep.runlog.folder import FILE_NAME, MAX_HEADER_BYTES, RunFile, list_runs
from safestep.runlog.lightning_csv import read_metrics_csv
from safestep.runlog.record import check_header
from safestep.runlog.table import Columns

__all__ = ["Run", "RunFile", "list_runs", "read_run"]

MAX_LINE_BYTES = 1 << 24  # a longer line is skipped: no record of a run is that long


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a run left behind.

    Attributes:
        path: The file it was read from.
        header: The first line of the log: id of the ``run``, versions, ``world_size``,
            ``settings``; and ``logits``,
            the line that says which were found, once a step was measured.
        steps: One column a field of StepReport, and any other key of a step record. Shape
            ``[T]``; float64 (NaN where a record lacks the key), ``step`` int64, text object. The
            column of a key that is rare in a large log is made whenever it is asked for.
        workers: Scalars ``[T]`` and per-worker columns ``[T, N]``, NaN where missing.
        events: The event records, in the order of the file.
        torn: Whether the last line was cut short by a kill, and therefore skipped.
        left_out: One sentence about each thing of the file that is not in the columns.
        nan_losses: Steps whose record says that the loss was NaN, which the columns cannot tell
            from a loss that was not logged; None where the file does not say.
        micro: A row for each micro-batch of each step, where ranks accumulate gradients: ``step``
            and ``micro`` ``[K]``, per-worker ``loss`` and ``grad_norm`` ``[K, N]``.
    """

    path: Path
    header: dict[str, Any]
    steps: Columns
    workers: Columns
    events: list[dict[str, Any]]
    torn: bool = False
    left_out: tuple[str, ...] = ()
    nan_losses: frozenset[int] | None = None
    micro: Columns = field(default_factory=lambda: Columns({}))

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

    A directory's ``run.jsonl`` is its newest run; `list_runs` of this module names the others.
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
            record that safestep does not write.

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
    builders = {kind: ColumnBuilder(path) for kind in ("step", "workers", "micro")}
    events: list[dict[str, Any]] = []
    unreadable: list[int] = []
    nan_losses: set[int] = set()
    num_foreign, torn = 0, False
    with path.open("rb") as file:
        header = check_header(file.readline(MAX_HEADER_BYTES), path)
        run = header.get("run")
        for number, record in _records(file):
            if record is None:
                unreadable.append(number)
                continue
            kind = record.pop("kind", None)
            if kind == "torn":
                torn = True
            elif record.pop("run", run) != run:
                num_foreign += 1
            elif kind in builders:
                builders[kind].add(record, number)
                is_nan = kind == "step" and record.get("loss") == "nan"
                if is_nan and isinstance(record.get("step"), int):
                    nan_losses.add(record["step"])
            elif kind == "event":
                events.append(record)
                if record.get("name") == "logits":
                    header.setdefault("logits", record.get("message"))
                if record.get("name") in ("resumed", "rolled back"):
                    for builder in builders.values():
                        builder.start_segment()
    steps, workers, micro = (builder.build() for builder in builders.values())
    left_out = _left_out(unreadable, num_foreign)
    left_out += [text for builder in builders.values() for text in builder.left_out]
    if torn:
        warn_user(f"read_run: skipped the torn last line of {path}.")
    if left_out:
        warn_user(f"read_run: {'; '.join(left_out)}, in {path}.")
    nan = frozenset(nan_losses) if "loss" in steps else None
    return Run(path, header, steps, workers, events, torn, tuple(left_out), nan, micro)


def _left_out(unreadable: list[int], num_foreign: int) -> list[str]:
    sentences = []
    if unreadable:
        lines = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        sentences.append(f"skipped {len(unreadable):,} unreadable lines: {lines}")
    if num_foreign:
        sentences.append(f"left out {num_foreign:,} records of other runs")
    return sentences


def _records(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield every line's number and record: None if unreadable, kind "torn" for a torn last one."""
    number = 1
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        is_whole = line.endswith(b"\n")
        record, end = None, b""
        while not is_whole and len(line) == MAX_LINE_BYTES:  # too long: read on to its end
            end, line = line, file.readline(MAX_LINE_BYTES)
            is_whole = line.endswith(b"\n")
        if not end:
            record = _parse(line)
        end += line
        if record is None and (start := end.rfind(b'{"kind": ')) > 0:
            yield number, None
            record = _parse(end[start:])  # another writer went on where a record was torn
            if record is not None:
                yield number, record
        elif record is None and not is_whole:
            yield number, {"kind": "torn"}
        else:
            yield number, record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
