"""Notice a call of ``training_step``, and run it again without a trace."""

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

    No hook of Lightning comes that late: a callback may change the batch in place, or draw random
    numbers, between ``on_train_batch_start`` and ``training_step``.

    Args:
        trainer: The trainer.
        module: The module whose ``training_step`` is watched, for one call.
        announce: Gets what runs the step again, and the arguments of the call.

    Returns:
        What puts ``training_step`` back, called or not.
    """
    own = vars(module).get("training_step")  # torch.compile leaves one there
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

    # Lightning looks one wrapper deep to see which arguments training_step takes.
    announced.__wrapped__ = inspect.unwrap(training_step)
    vars(module)["training_step"] = announced
    return put_back


def takes_iterator(module: LightningModule) -> bool:
    """Return whether ``training_step`` fetches its batches itself: a second run would eat more."""
    return "dataloader_iter" in inspect.signature(inspect.unwrap(module.training_step)).parameters


@contextmanager
def quiet(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let ``self.log``, ``self.print`` and the loggers do nothing inside.

    Args:
        trainer: The trainer, whose loggers are silent.
        module: The module that is silent, and every LightningModule within it.

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
