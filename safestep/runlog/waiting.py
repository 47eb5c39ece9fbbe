"""Records that could not be written yet, in memory up to a small bound."""

from __future__ import annotations

from collections import deque

MOST_BYTES = 1 << 23  # some ten thousand records


class WaitingRecords:
    """Queue of records that drops the oldest when they take too much memory.

    Attributes:
        num_lost: Number of records that were dropped.

    Example:
        >>> waiting = WaitingRecords(most_bytes=8)
        >>> for body in (b"{1}", b"{2}", b"{3}"):
        ...     waiting.add("step", body)
        >>> waiting.first(), waiting.num_lost
        (('step', b'{2}'), 1)
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.num_lost = 0
        self._most = most_bytes
        self._records: deque[tuple[str, bytes]] = deque()
        self._size = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, kind: str, body: bytes) -> None:
        """Add a record.

        Args:
            kind: Its kind.
            body: The rest of it, as JSON.
        """
        self._records.append((kind, body))
        self._size += len(body)
        while self._size > self._most and len(self._records) > 1:
            self.pop()
            self.num_lost += 1

    def first(self) -> tuple[str, bytes]:
        """Return the kind and the rest of the oldest record."""
        return self._records[0]

    def pop(self) -> None:
        """Remove the oldest record."""
        self._size -= len(self._records.popleft()[1])

    def clear(self) -> None:
        """Forget all of them."""
        self._records.clear()
        self._size = self.num_lost = 0
