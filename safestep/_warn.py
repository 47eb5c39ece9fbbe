"""What is said to the user: warnings that point at a line of the program, and errors on purpose."""

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


class RaisedOnPurpose:
    """Marks an error that is meant for the training loop, so that no hook keeps it back."""


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
