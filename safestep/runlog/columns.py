"""Turn a stream of records into numpy columns, with memory proportional to the file size."""

from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
MAX_FIELDS = 512  # a log is untrusted: no line may make the reader fill the memory
_CHUNK_RECORDS = 512  # small enough that the records stay in the processor's cache
_DENSE_RECORDS = 64  # this many records with the same keys become an array at once
_MIN_BYTES = 1 << 26  # columns of up to this size are always made
_MAX_GROWTH = 4  # beyond it, columns take at most this multiple of the file's size


class ColumnBuilder:
    """Collect records of one kind; missing keys become NaN, or None in text columns.

    Rare keys are left out if the columns would take more than four times the file's size (and
    more than 64 MB). So are lists that are far longer than the others. ``left_out`` names both.

    Args:
        path: The file the records come from; used for its size and in errors.

    Attributes:
        left_out: One sentence for each omission of `build`.

    Example:
        >>> builder = ColumnBuilder(Path("run.jsonl"))
        >>> builder.add({"step": 0, "radius": "inf"}, line=2)
        >>> builder.add({"step": 1}, line=3)
        >>> builder.build()
        {'step': array([0, 1]), 'radius': array([inf, nan])}
    """

    def __init__(self, path: Path) -> None:
        self.left_out: list[str] = []
        self._path = path
        self._records: list[dict[str, Any]] = []
        self._first_line = 0
        self._num_rows = 0
        self._columns: dict[str, _Column] = {}
        self._segments: list[int] = []
        self._texts: dict[str, str] = {}  # stores each distinct text once

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

    def build(self) -> dict[str, np.ndarray]:
        """Return the columns: ``step`` int64, numbers float64, lists ``[T, N]``, text object."""
        self._flush()
        for name, column in self._columns.items():
            self._pack(name, column)
        columns: dict[str, np.ndarray] = {"step": np.empty(0)}
        for name in self._affordable():
            columns[name] = self._join(name, self._columns[name])
        columns["step"] = columns["step"].astype(np.int64)
        keep = _is_current(columns["step"], self._segments)
        return columns if keep.all() else {name: col[keep] for name, col in columns.items()}

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
            if len(self._columns) >= MAX_FIELDS:
                self._fail(f"at most {MAX_FIELDS} keys", "more")
            column = self._columns[name] = _Column()
        if len(rows) >= _DENSE_RECORDS:
            column.blocks.append((rows, self._convert(name, values)))
            return
        column.rows += rows.tolist()
        column.values += values
        if len(column.rows) >= _CHUNK_RECORDS:
            self._pack(name, column)

    def _pack(self, name: str, column: "_Column") -> None:
        if column.rows:
            column.blocks.append((np.array(column.rows), self._convert(name, column.values)))
            column.rows, column.values = [], []

    def _convert(self, name: str, values: Any) -> "np.ndarray | _Lists":
        field = FIELDS.get(name)
        if field == "text":
            texts = [None if value is None else str(value) for value in values]
            return _objects([text and self._texts.setdefault(text, text) for text in texts])
        try:
            if list in set(map(type, values)):
                if field == "number":
                    self._fail(f"numbers in `{name}`", "a list")
                return _Lists([v if isinstance(v, list) else [v] for v in values])
            numbers = np.array(values, dtype=np.float64)  # "nan" and "inf" parse, None is NaN
        except (ValueError, TypeError, OverflowError):
            if field is not None:
                self._fail(f"numbers in `{name}`", "another value")
            return _objects(values)
        if name == "step" and not (np.isfinite(numbers) & (abs(numbers) < 2**53)).all():
            self._fail("a whole number as `step` of every record", "none")
        return numbers

    def _fail(self, expected: str, got: str) -> None:
        raise ValueError(
            f"read_run: expected {expected} in {self._path}, got {got} in the records from line "
            f"{self._first_line} on. The log was not written by safestep, or is damaged."
        )

    def _affordable(self) -> list[str]:
        """Return the columns to build: safestep's own, then the most frequent that fit."""
        names = sorted(self._columns, key=lambda n: (n not in FIELDS, -self._columns[n].count))
        size = self._path.stat().st_size if self._path.is_file() else 0
        most = max(_MIN_BYTES, _MAX_GROWTH * size) // (8 * self._num_rows + 1)
        fitting = max(most, sum(name in FIELDS for name in names))
        if len(names) > fitting:
            self.left_out.append(
                f"the {len(names) - fitting} rarest keys of the {self._num_rows:,} records are "
                f"left out, {', '.join(names[fitting : fitting + 3])} among them: as columns they "
                f"would take over {_MAX_GROWTH} times the size of the file"
            )
        kept = set(names[:fitting])
        return [name for name in self._columns if name in kept]  # in the order of the file

    def _join(self, name: str, column: "_Column") -> np.ndarray:
        blocks = column.blocks
        if any(isinstance(part, np.ndarray) and part.dtype == object for _, part in blocks):
            joined = np.full(self._num_rows, None, dtype=object)
            for rows, part in blocks:
                joined[rows] = _objects(part.to_lists()) if isinstance(part, _Lists) else part
            return joined
        lists = [part for _, part in blocks if isinstance(part, _Lists)]
        if not lists:
            joined = np.full(self._num_rows, np.nan)
            for rows, part in blocks:
                joined[rows] = part
            return joined
        width = self._affordable_width(name, np.concatenate([part.lengths for part in lists]))
        joined = np.full((self._num_rows, width), np.nan)
        for rows, part in blocks:
            if isinstance(part, _Lists):
                part.write(joined, rows)
            elif width:
                joined[rows, 0] = part
        return joined

    def _affordable_width(self, name: str, lengths: np.ndarray) -> int:
        """Return the largest width at which padding stays in proportion to the data."""
        most = max(_MIN_BYTES // 8, _MAX_GROWTH * lengths.sum()) // max(self._num_rows, 1)
        is_fitting = lengths <= most
        if not is_fitting.all():
            self.left_out.append(
                f"{(~is_fitting).sum():,} lists of `{name}` are left out: of up to "
                f"{lengths.max():,} numbers, where the others have up to "
                f"{lengths[is_fitting].max(initial=0):,}"
            )
        return int(lengths[is_fitting].max(initial=0))


class _Column:
    """The values of one key with their rows; those of rare keys wait as Python objects."""

    def __init__(self) -> None:
        self.blocks: list[tuple[np.ndarray, np.ndarray | _Lists]] = []
        self.rows: list[int] = []
        self.values: list[Any] = []

    @property
    def count(self) -> int:
        return sum(len(rows) for rows, _ in self.blocks)


class _Lists:
    """Lists of numbers of any length, stored back to back."""

    def __init__(self, lists: list[list[Any]]) -> None:
        self.lengths = np.array([len(item) for item in lists])
        self.numbers = np.array(list(chain.from_iterable(lists)), dtype=np.float64)
        if self.numbers.ndim != 1:
            raise ValueError("a list of lists")

    def write(self, table: np.ndarray, rows: np.ndarray) -> None:
        """Fill rows of a table from the left; skip lists wider than the table."""
        ends = np.cumsum(self.lengths)
        for length in np.unique(self.lengths[self.lengths <= table.shape[1]]):
            chosen = np.flatnonzero(self.lengths == length)
            places = (ends[chosen] - length)[:, None] + np.arange(length)
            table[rows[chosen], :length] = self.numbers[places]

    def to_lists(self) -> list[list[float]]:
        ends = np.cumsum(self.lengths)
        parts = zip(ends - self.lengths, ends, strict=True)
        return [self.numbers[start:end].tolist() for start, end in parts]


def _objects(values: Any) -> np.ndarray:
    return np.fromiter(values, dtype=object, count=len(values))


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
