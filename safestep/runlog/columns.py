"""Turn a stream of records into numpy columns, in memory that stays bounded."""

from itertools import chain
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np

TEXT_FIELDS = frozenset({"estimator", "status", "reason"})
NUMBER_FIELDS = frozenset({
    "step", "normalized_step", "radius", "step_norm", "spread", "scale", "learning_rate",
    "effective_learning_rate", "seconds", "bottleneck", "loss_std", "loss_range",
    "grad_norm_std", "grad_norm_cv", "pairwise_cosine", "noise_scale", "outlier",
})  # fmt: skip
LIST_FIELDS = frozenset({"grad_norm", "cosine_to_mean"})  # "loss" too, but step records have one
MAX_FIELDS = 512  # a log is untrusted: no line may make the reader fill the memory
_CHUNK_RECORDS = 512  # small enough that the records stay in the processor's cache


class ColumnBuilder:
    """Collect records of one kind; missing keys become NaN, or None in text columns.

    Args:
        path: The file the records come from, for errors.

    Example:
        >>> builder = ColumnBuilder(Path("run.jsonl"))
        >>> builder.add({"step": 0, "radius": "inf"}, line=2)
        >>> builder.add({"step": 1}, line=3)
        >>> builder.build()
        {'step': array([0, 1]), 'radius': array([inf, nan])}
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[dict[str, Any]] = []
        self._first_line = 0
        self._num_rows = 0
        self._chunks: dict[str, list[tuple[int, np.ndarray]]] = {"step": []}
        self._segments: list[int] = []

    def add(self, record: dict[str, Any], line: int) -> None:
        """Take one record, which came from the given line.

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
        """Say that the run was resumed here: steps taken again supersede the earlier ones."""
        self._flush()
        self._segments.append(self._num_rows)

    def build(self) -> dict[str, np.ndarray]:
        """Return the columns: ``step`` int64, numbers float64, lists ``[T, N]``, text object."""
        self._flush()
        columns = {name: self._join(chunks) for name, chunks in self._chunks.items()}
        columns["step"] = columns["step"].astype(np.int64)
        keep = _is_current(columns["step"], self._segments)
        return columns if keep.all() else {name: col[keep] for name, col in columns.items()}

    def _flush(self) -> None:
        if not self._records:
            return
        names = dict.fromkeys(["step", *chain.from_iterable(self._records)])
        if len(self._chunks.keys() | names) > MAX_FIELDS:
            self._fail(f"at most {MAX_FIELDS} keys", "more")
        for name in names:
            values = [record.get(name) for record in self._records]
            self._chunks.setdefault(name, []).append((self._num_rows, self._convert(name, values)))
        self._num_rows += len(self._records)
        self._records = []

    def _convert(self, name: str, values: list[Any]) -> np.ndarray:
        if name in TEXT_FIELDS:
            return _objects([None if value is None else intern(str(value)) for value in values])
        try:
            if list in set(map(type, values)):
                if name in NUMBER_FIELDS:
                    self._fail(f"numbers in `{name}`", "a list")
                return _padded([value if isinstance(value, list) else [value] for value in values])
            numbers = np.array(values, dtype=np.float64)  # "nan" and "inf" parse, None is NaN
        except (ValueError, TypeError, OverflowError):
            if name in NUMBER_FIELDS or name in LIST_FIELDS:
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

    def _join(self, chunks: list[tuple[int, np.ndarray]]) -> np.ndarray:
        arrays = [array for _, array in chunks]
        if any(array.dtype == object for array in arrays):
            joined = np.full(self._num_rows, None, dtype=object)
        elif any(array.ndim == 2 for array in arrays):
            width = max(array.shape[-1] for array in arrays if array.ndim == 2)
            joined = np.full((self._num_rows, width), np.nan)
            chunks = [(start, array.reshape(len(array), -1)) for start, array in chunks]
        else:
            joined = np.full(self._num_rows, np.nan)
        for start, array in chunks:
            if joined.ndim == 2:
                joined[start : start + len(array), : array.shape[1]] = array
            else:
                joined[start : start + len(array)] = list(array) if array.ndim == 2 else array
        return joined


def _padded(rows: list[list[Any]]) -> np.ndarray:
    # NaN at the end of the short rows.
    width = max(len(row) for row in rows)
    padded = np.array([[*row, *[None] * (width - len(row))] for row in rows], dtype=np.float64)
    if padded.ndim != 2:
        raise ValueError("a list of lists")
    return padded.reshape(len(rows), width)


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _is_current(steps: np.ndarray, segments: list[int]) -> np.ndarray:
    """Return which rows no later segment took again. Shape ``[T]``."""
    keep = np.ones(len(steps), dtype=bool)
    first_retaken = np.inf
    end = len(steps)
    for start in reversed([0, *segments]):
        keep[start:end] = steps[start:end] < first_retaken
        first_retaken = min(first_retaken, steps[start:end].min(initial=np.iinfo(np.int64).max))
        end = start
    return keep
