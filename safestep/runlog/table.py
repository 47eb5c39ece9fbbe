"""Columns of a log that take no more memory than their values, however many they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from itertools import chain
from typing import Any

import numpy as np


class Columns(MutableMapping[str, np.ndarray]):
    """Columns by name; some of them are made anew each time they are asked for.

    A column has a place for every record. That of a rare key would take far more memory than its
    values, so only these are kept.

    Args:
        columns: Arrays, or functions that make them, by name.

    Example:
        >>> columns = Columns({"step": np.arange(3), "rare": lambda: np.array([np.nan, 2.0, 3.0])})
        >>> columns["rare"][1], sorted(columns)
        (np.float64(2.0), ['rare', 'step'])
    """

    def __init__(self, columns: dict[str, np.ndarray | Callable[[], np.ndarray]]) -> None:
        self._columns = columns

    def __getitem__(self, name: str) -> np.ndarray:
        column = self._columns[name]
        return column() if callable(column) else column

    def __setitem__(self, name: str, column: np.ndarray) -> None:
        self._columns[name] = column

    def __delitem__(self, name: str) -> None:
        del self._columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self._columns  # without making it

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"Columns({', '.join(self)})"

    def changed(self, change: Callable[[np.ndarray], np.ndarray]) -> Columns:
        """Return what a function makes of each column; of the rare ones, when asked for.

        Args:
            change: Takes a column and returns one.

        Returns:
            The columns.
        """
        return Columns({
            name: _then(column, change) if callable(column) else change(column)
            for name, column in self._columns.items()
        })  # fmt: skip


def _then(
    make: Callable[[], np.ndarray], change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[], np.ndarray]:
    return lambda: change(make())


class SparseColumn:
    """The values of one key with their rows; the latest wait as Python objects."""

    def __init__(self) -> None:
        self.blocks: list[tuple[np.ndarray, np.ndarray | Lists]] = []
        self.rows: list[int] = []
        self.values: list[Any] = []

    @property
    def count(self) -> int:
        """Number of its values, but for those that wait."""
        return sum(len(rows) for rows, _ in self.blocks)

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of its lists; empty where it holds none."""
        parts = [part.lengths for _, part in self.blocks if isinstance(part, Lists)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    @property
    def has_objects(self) -> bool:
        """Whether a value is neither a number nor a list of numbers."""
        return any(isinstance(p, np.ndarray) and p.dtype == object for _, p in self.blocks)

    def filled(self, num_rows: int, width: int) -> np.ndarray:
        """Return the column with a place for every record.

        Args:
            num_rows: Number of records.
            width: That of a table of lists; longer lists are not in it.

        Returns:
            Numbers ``[T]``, NaN where there is none; lists ``[T, N]``; objects ``[T]``, None where
            there is none.
        """
        if self.has_objects:
            filled = np.full(num_rows, None, dtype=object)
            for rows, part in self.blocks:
                filled[rows] = objects(part.to_lists()) if isinstance(part, Lists) else part
            return filled
        if not len(self.lengths):
            filled = np.full(num_rows, np.nan)
            for rows, part in self.blocks:
                filled[rows] = part
            return filled
        filled = np.full((num_rows, width), np.nan)
        for rows, part in self.blocks:
            if isinstance(part, Lists):
                part.write(filled, rows)
            elif width:
                filled[rows, 0] = part
        return filled

    def longer(self, num_rows: int, width: int) -> np.ndarray:
        """Return the lists that are longer than a width.

        Args:
            num_rows: Number of records.
            width: The width.

        Returns:
            An array for each of them, None for the other records. Shape ``[T]``.
        """
        filled = np.full(num_rows, None, dtype=object)
        for rows, part in self.blocks:
            if isinstance(part, Lists):
                for index in np.flatnonzero(part.lengths > width):
                    filled[rows[index]] = part[int(index)]
        return filled


class Lists:
    """Lists of numbers of any length, stored back to back."""

    def __init__(self, lists: list[list[Any]]) -> None:
        self.lengths = np.array([len(item) for item in lists])
        self.numbers = np.array(list(chain.from_iterable(lists)), dtype=np.float64)
        if self.numbers.ndim != 1:
            raise ValueError("a list of lists")
        self._ends = np.cumsum(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        end = self._ends[index]
        return self.numbers[end - self.lengths[index] : end]

    def write(self, table: np.ndarray, rows: np.ndarray) -> None:
        """Fill rows of a table from the left; skip lists wider than the table."""
        for length in np.unique(self.lengths[self.lengths <= table.shape[1]]):
            chosen = np.flatnonzero(self.lengths == length)
            places = (self._ends[chosen] - length)[:, None] + np.arange(length)
            table[rows[chosen], :length] = self.numbers[places]

    def to_lists(self) -> list[list[float]]:
        """Return them as Python lists."""
        return [self[index].tolist() for index in range(len(self.lengths))]


def objects(values: Any) -> np.ndarray:
    """Return values of any kind as an array of objects, one for each of them."""
    return np.fromiter(values, dtype=object, count=len(values))
