"""Turn a stream of records into numpy columns, with memory proportional to the file size."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safestep.runlog.table import Columns, Lists, SparseColumn, objects

# The keys that safestep itself writes, with their types. Other keys take the type of their values.
FIELDS: dict[str, Literal["number", "text", "list"]] = {
    **dict.fromkeys(
        ("estimator", "status", "reason", "gradient_reason", "loss_reason", "second_run"), "text"
    ),
    **dict.fromkeys(
        ("step", "normalized_step", "radius", "step_norm", "spread", "scale", "learning_rate",
         "effective_learning_rate", "seconds", "time", "bottleneck", "gradient_ratio",
         "divergence", "loss_slope", "loss_std", "loss_range", "grad_norm_std", "grad_norm_cv",
         "pairwise_cosine", "noise_scale", "outlier", "micro"),
        "number",
    ),
    **dict.fromkeys(("grad_norm", "cosine_to_mean"), "list"),  # "loss" is a list only of workers
}  # fmt: skip
MAX_FIELDS = 2**16  # a log is untrusted: no line may make the reader fill the memory
_CHUNK_RECORDS = 512  # small enough that the records stay in the processor's cache
_MAX_WAITING = 2**18  # values of rare keys that are Python objects still
_DENSE_RECORDS = 64  # this many records with the same keys become an array at once
_MIN_BYTES = 1 << 26  # columns of up to this size are made at once
_MAX_GROWTH = 4  # beyond it, those made at once take at most this multiple of the file's size


class ColumnBuilder:
    """Collect records of one kind; missing keys become NaN, or None in text columns.

    If the columns would take more than four times the file's size (and more than 64 MB), those of
    the rarest keys are made when they are asked for. Lists that are far longer than the others of
    their key get a column of their own, ``"loss (long)"``, of an array for each of them.

    Args:
        path: The file the records come from; used for its size and in errors.

    Attributes:
        left_out: One sentence for each omission of `build`.

    Example:
        >>> builder = ColumnBuilder(Path("run.jsonl"))
        >>> builder.add({"step": 0, "radius": "inf"}, line=2)
        >>> builder.add({"step": 1}, line=3)
        >>> dict(builder.build())
        {'step': array([0, 1]), 'radius': array([inf, nan])}
    """

    def __init__(self, path: Path) -> None:
        self.left_out: list[str] = []
        self._path = path
        self._records: list[dict[str, Any]] = []
        self._first_line = 0
        self._num_rows = 0
        self._columns: dict[str, SparseColumn] = {}
        self._segments: list[int] = []
        self._texts: dict[str, str] = {}  # stores each distinct text once
        self._num_waiting = 0  # values that are Python objects still
        self._num_unknown = 0  # values of keys beyond the most that are kept

    def add(self, record: dict[str, Any], line: int) -> None:
        """Add a record that came from the given line.

        Args:
            record: The record, without its kind.
            line: Its line in the file, for errors.
        """
        if not self._records:
            self._first_line = line
        self._records.append(record)
        if len(self._records) >= _CHUNK_RECORDS:
            self._flush()

    def start_segment(self) -> None:
        """Mark that the run was resumed here: repeated steps replace the earlier ones."""
        self._flush()
        self._segments.append(self._num_rows)

    def build(self) -> Columns:
        """Return the columns: ``step`` int64, numbers float64, lists ``[T, N]``, text object."""
        self._flush()
        self._pack_all()
        steps = self._columns.pop("step", SparseColumn()).filled(self._num_rows, 0)
        steps = steps.astype(np.int64)
        keep = _is_current(steps, self._segments)
        made: dict[str, Any] = {"step": steps[keep]}
        if self._num_unknown:
            self.left_out.append(
                f"{self._num_unknown:,} values of keys beyond the first {MAX_FIELDS:,} are left out"
            )
        dense = self._dense()
        for name, column in self._columns.items():
            width = self._width(name, column.lengths)
            make = partial(_kept, column.filled, self._num_rows, width, keep)
            made[name] = make() if name in dense else make
            if (column.lengths > width).any() and not column.has_objects:
                made[f"{name} (long)"] = partial(_kept, column.longer, self._num_rows, width, keep)
        return Columns(made)

    def _flush(self) -> None:
        """Move the records into columns; records with the same keys go together."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, record in enumerate(self._records):
            groups.setdefault(tuple(record), []).append(row)
        for names, rows in groups.items():
            if "step" not in names:
                self._fail("a whole number as `step` of every record", "none")
            values = zip(*(self._records[row].values() for row in rows), strict=True)
            places = np.array(rows) + self._num_rows
            for name, part in zip(names, values, strict=True):
                self._extend(name, places, part)
        self._num_rows += len(self._records)
        self._records = []

    def _extend(self, name: str, rows: np.ndarray, values: tuple[Any, ...]) -> None:
        column = self._columns.get(name)
        if column is None:
            if len(self._columns) >= MAX_FIELDS and name not in FIELDS:
                self._num_unknown += len(rows)
                return
            column = self._columns[name] = SparseColumn()
        if len(rows) >= _DENSE_RECORDS:
            column.blocks.append((rows, self._convert(name, values)))
            return
        column.rows += rows.tolist()
        column.values += values
        self._num_waiting += len(rows)
        if len(column.rows) >= _CHUNK_RECORDS:
            self._pack(name, column)
        elif self._num_waiting >= _MAX_WAITING:
            self._pack_all()

    def _pack_all(self) -> None:
        for name, column in self._columns.items():
            self._pack(name, column)

    def _pack(self, name: str, column: SparseColumn) -> None:
        if column.rows:
            column.blocks.append((np.array(column.rows), self._convert(name, column.values)))
            self._num_waiting -= len(column.rows)
            column.rows, column.values = [], []

    def _convert(self, name: str, values: Any) -> np.ndarray | Lists:
        field = FIELDS.get(name)
        if field == "text":
            texts = [None if value is None else str(value) for value in values]
            return objects([text and self._texts.setdefault(text, text) for text in texts])
        try:
            if list in set(map(type, values)):
                if field == "number":
                    self._fail(f"numbers in `{name}`", "a list")
                return Lists([v if isinstance(v, list) else [v] for v in values])
            numbers = np.array(values, dtype=np.float64)  # "nan" and "inf" parse, None is NaN
        except (ValueError, TypeError, OverflowError):
            if field is not None:
                self._fail(f"numbers in `{name}`", "another value")
            return objects(values)
        if name == "step" and not (np.isfinite(numbers) & (abs(numbers) < 2**53)).all():
            self._fail("a whole number as `step` of every record", "none")
        return numbers

    def _fail(self, expected: str, got: str) -> None:
        raise ValueError(
            f"read_run: expected {expected} in {self._path}, got {got} in the records from line "
            f"{self._first_line} on. The log was not written by safestep, or is damaged."
        )

    def _dense(self) -> set[str]:
        """Return the columns that are made at once: safestep's own, then the most frequent."""
        names = sorted(self._columns, key=lambda n: (n not in FIELDS, -self._columns[n].count))
        size = self._path.stat().st_size if self._path.is_file() else 0
        most = max(_MIN_BYTES, _MAX_GROWTH * size) // (8 * self._num_rows + 1)
        return set(names[: max(most, sum(name in FIELDS for name in names))])

    def _width(self, name: str, lengths: np.ndarray) -> int:
        """Return the largest width at which padding stays in proportion to the data."""
        most = max(_MIN_BYTES // 8, _MAX_GROWTH * lengths.sum()) // max(self._num_rows, 1)
        is_fitting = lengths <= most
        width = int(lengths[is_fitting].max(initial=0))
        if not is_fitting.all():
            self.left_out.append(
                f"{(~is_fitting).sum():,} lists of `{name}` are in the column `{name} (long)`: of "
                f"up to {lengths.max():,} numbers, where the others have up to {width:,}"
            )
        return width


def _kept(
    make: Callable[[int, int], np.ndarray], num_rows: int, width: int, keep: np.ndarray
) -> np.ndarray:
    column = make(num_rows, width)
    return column if keep.all() else column[keep]


def _is_current(steps: np.ndarray, segments: list[int]) -> np.ndarray:
    """Return a mask of the rows that no later segment repeats. Shape ``[T]``."""
    keep = np.ones(len(steps), dtype=bool)
    first_retaken = np.inf
    end = len(steps)
    for start in reversed([0, *segments]):
        keep[start:end] = steps[start:end] < first_retaken
        first_retaken = min(first_retaken, steps[start:end].min(initial=np.iinfo(np.int64).max))
        end = start
    return keep
