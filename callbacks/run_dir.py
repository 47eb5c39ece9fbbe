"""Where a Lightning run keeps its ``run.jsonl``."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def default_run_dir(trainer: Trainer) -> Path | None:
    """Return the directory of the first logger's files, the same on every rank.

    Every rank must call it, since rank 0 tells the others.

    Args:
        trainer: The trainer, with its strategy set up.

    Returns:
        The directory, None where the trainer has no logger or one that writes no files.
    """
    directory = trainer.log_dir if trainer.loggers else None
    return Path(directory) if directory else None
