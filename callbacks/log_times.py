"""When a callback logs its numbers with Lightning, which takes a millisecond for ten of them."""

from __future__ import annotations

from lightning.pytorch import Trainer

FIRST_STEPS = 50  # which short runs, and people who look at the trainer's metrics, see all of


def is_logged_now(trainer: Trainer) -> bool:
    """Return whether the numbers of this batch are logged: loggers write them, or the run is young.

    Args:
        trainer: The trainer, within a hook of a training batch.
    """
    connector = getattr(trainer, "_logger_connector", None)
    loggers_write = getattr(connector, "should_update_logs", True)
    return trainer.global_step <= FIRST_STEPS or bool(loggers_write)
