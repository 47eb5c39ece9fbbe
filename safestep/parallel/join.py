"""Follow ``ddp.join()``: which ranks have run out of data, and when all have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn.parallel import DistributedDataParallel


class JoinShadow:
    """Hears when this rank runs out of data, and when all ranks have.

    ``ddp.join()`` asks ``ddp.join_hook`` for what such a rank does. An attribute of that name on
    the instance adds to it. A copy or a pickle of the model gets DDP's own hook back.

    Args:
        ddp: The model.
        enter: Called on every rank when the context is made.
        leave: Called for every step that the other ranks take, before DDP answers for its own
            collectives.
        rejoin: Called at the end with whether this rank had data to the end.
    """

    def __init__(
        self,
        ddp: Any,
        enter: Callable[[], None],
        leave: Callable[[], None],
        rejoin: Callable[[bool], None],
    ) -> None:
        self._ddp = ddp
        self._below = ddp.join_hook  # DDP's own, or that of another guard
        self._enter, self.leave, self._rejoin = enter, leave, rejoin
        self._is_on, self._is_within = True, False
        ddp.join_hook = self

    @property
    def is_joining(self) -> bool:
        """Whether a ``join()`` of the model is under way that is enabled, on every rank alike."""
        return self._is_on and self._is_within and self._ddp._join_config.enable

    def __call__(self, **kwargs: Any) -> Any:
        """Return what a rank without data does, in the form of a torch JoinHook."""
        hook = self._below(**kwargs)
        if not self._is_on:
            return hook
        self._is_within = False
        self._enter()
        self._is_within = True
        return _Both(hook, self)

    def rejoin(self, is_last: bool) -> None:
        """End the context."""
        self._is_within = False
        self._rejoin(is_last)

    def detach(self) -> None:
        """Give the model its own hook back."""
        self._is_on = False
        if vars(self._ddp).get("join_hook") is self:
            if isinstance(self._below, JoinShadow):
                self._ddp.join_hook = self._below
            else:
                del self._ddp.join_hook

    def __reduce__(self) -> Any:
        return partial, (DistributedDataParallel.join_hook, self._ddp)


class _Both:
    """The hook of the model, and that of the guard."""

    def __init__(self, hook: Any, shadow: JoinShadow) -> None:
        self._hook, self._shadow = hook, shadow

    def main_hook(self) -> None:
        """Shadow one step of the other ranks, which know by its end that this rank is absent."""
        self._shadow.leave()
        self._hook.main_hook()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Become like a rank that had data to the end."""
        self._hook.post_hook(is_last_joiner)
        self._shadow.rejoin(is_last_joiner)
