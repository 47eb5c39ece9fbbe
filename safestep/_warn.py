"""Warnings that point at the line of the user's program they are about."""

from __future__ import annotations

import sys
import warnings

# What stands between the user's line and a hook that warns; the last two are wrappers.
_BETWEEN = {
    "safestep",
    "torch",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "contextlib",
    "multiprocessing",
}


def warn_user(message: str) -> None:
    """Warn with the file and line of the nearest caller outside of these libraries.

    Where there is none, as in a thread of the autograd engine, the line is not said.

    Args:
        message: What happened and what to do.
    """
    # warnings.warn's skip_file_prefixes does this from Python 3.12 on.
    frame, level = sys._getframe(1), 2
    while frame is not None and _is_between(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_between(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _BETWEEN
