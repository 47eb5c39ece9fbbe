"""Write the files of a report inside of its folder only, whatever lies there already."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def make_report_folder(path: Path, *, is_chosen: bool = False) -> None:
    """Make a folder; a link of that name is followed only if the user chose it.

    Args:
        path: The folder.
        is_chosen: Whether the user gave the path.
    """
    if path.is_symlink() and not is_chosen:
        path.unlink()
    path.mkdir(parents=True, exist_ok=True)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader sees the old one or the new one, never a half.

    A link of that name, which a stranger's folder may hold, is replaced and not followed.

    Args:
        path: The file.
        write: Is called with a binary file open for writing.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:  # "x" follows no link
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
