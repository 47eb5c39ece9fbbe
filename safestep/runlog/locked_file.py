"""A file that one process appends whole lines to."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be renamed there, so runs do not mix either
    fcntl = None


_CHUNK = 1 << 20


class LockedFile:
    """An open file, locked against other processes until it is closed or this process ends.

    Args:
        path: The file.
        is_new: Whether to make it; else it must be there.

    Attributes:
        is_ours: False if another process has the lock.

    Raises:
        OSError: If it cannot be made or opened.
    """

    def __init__(self, path: Path, *, is_new: bool) -> None:
        flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
        flags |= os.O_CREAT | os.O_EXCL if is_new else 0
        self._fd = os.open(path, flags, 0o666)
        self.close = weakref.finalize(self, os.close, self._fd)
        self.is_ours = self._lock()

    @property
    def is_deleted(self) -> bool:
        """Whether the file has no name any more."""
        return os.fstat(self._fd).st_nlink == 0

    def append(self, line: bytes) -> None:
        """Write a line at the end.

        Args:
            line: The line, newline included.

        Raises:
            OSError: If it could not be written, or only in part.
        """
        # One write for the whole line: a reader never sees the lines of two writers mixed.
        if os.write(self._fd, line) != len(line):
            raise OSError("the last record was written in part")

    def append_all_of(self, other: LockedFile) -> None:
        """Write the whole lines of another open file, which may be deleted.

        Args:
            other: The file.

        Raises:
            OSError: If not all of them could be written.
        """
        position = 0
        while part := os.pread(other._fd, _CHUNK, position):
            position += len(part)
            self.append(part)
        self.cut_torn_line()

    def cut_torn_line(self) -> None:
        """Cut the file after its last whole line, of which it must have one."""
        end = os.lseek(self._fd, 0, os.SEEK_END)
        while True:  # back, block by block, to the end of the last whole line
            start = max(0, end - 65536)
            os.lseek(self._fd, start, os.SEEK_SET)
            newline = os.read(self._fd, end - start).rfind(b"\n")
            if newline >= 0:
                os.ftruncate(self._fd, start + newline + 1)
                return
            end = start

    def _lock(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True
