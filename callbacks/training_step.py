"""Intercept a call of ``training_step``, and run it again without logging."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger


def announce_training_step(
    trainer: Trainer, module: LightningModule, announce: Callable[..., None]
) -> Callable[[], None]:
    """Call ``announce(replay, *args, **kwargs)`` just before the next call of ``training_step``.

    No Lightning hook runs late enough: between ``on_train_batch_start`` and ``training_step`` a
    callback may still change the batch in place or draw random numbers.

    Args:
        trainer: The trainer.
        module: The module whose ``training_step`` is watched, for one call.
        announce: Receives a function that runs the step again, and the arguments of the call.

    Returns:
        A function that restores ``training_step``, whether or not it was called.
    """
    own = vars(module).get("training_step")  # set by torch.compile
    training_step = module.training_step

    def replay(*args: Any, **kwargs: Any) -> Any:
        with quiet(trainer, module), trainer.precision_plugin.train_step_context():
            return training_step(*args, **kwargs)

    def put_back() -> None:
        vars(module).pop("training_step", None)
        if own is not None:
            vars(module)["training_step"] = own

    @wraps(training_step)
    def announced(*args: Any, **kwargs: Any) -> Any:
        put_back()
        announce(replay, *args, **kwargs)
        return training_step(*args, **kwargs)

    # Lightning unwraps one level to find the arguments that training_step takes.
    announced.__wrapped__ = inspect.unwrap(training_step)
    vars(module)["training_step"] = announced
    return put_back


def takes_iterator(module: LightningModule) -> bool:
    """Return whether ``training_step`` fetches its own batches; a second run would consume more."""
    return "dataloader_iter" in inspect.signature(inspect.unwrap(module.training_step)).parameters


@contextmanager
def quiet(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Disable ``self.log``, ``self.print`` and the loggers within the context.

    Args:
        trainer: The trainer whose loggers are disabled.
        module: The module to silence, with every LightningModule in it.

    Yields:
        Nothing.
    """
    loggers = trainer.loggers
    speakers = [child for child in module.modules() if isinstance(child, LightningModule)]
    saved = [dict(vars(speaker)) for speaker in speakers]
    trainer.loggers = [DummyLogger() for _ in loggers]
    for speaker in speakers:
        vars(speaker).update(log=_ignore, print=_ignore)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for speaker, attributes in zip(speakers, saved, strict=True):
            for name in ("log", "print"):
                vars(speaker).pop(name, None)
            vars(speaker).update({k: attributes[k] for k in ("log", "print") if k in attributes})


def _ignore(*_: Any, **__: Any) -> None:
    pass
