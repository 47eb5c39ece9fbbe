"""Take part in collectives within ``ddp.join()`` on a rank that has no more data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn.parallel import DistributedDataParallel


class JoinShadow:
    """Answers for a rank that has no more data, after DDP has answered for its own collectives.

    ``ddp.join()`` asks ``ddp.join_hook`` for what such a rank does. An attribute of that name on
    the instance adds to it. A copy or a pickle of the model gets DDP's own hook back.

    Args:
        ddp: The model.
        be_absent: Called once for every step that the other ranks take.
        rejoin: Called at the end with whether this rank had data to the end.
    """

    def __init__(
        self, ddp: Any, be_absent: Callable[[], None], rejoin: Callable[[bool], None]
    ) -> None:
        self._ddp = ddp
        self._below = ddp.join_hook  # DDP's own, or that of another guard
        self.be_absent, self.rejoin = be_absent, rejoin
        self._is_on = True
        ddp.join_hook = self

    @property
    def is_joining(self) -> bool:
        """Whether the latest ``join()`` of the model was enabled, on every rank alike."""
        # torch leaves the flag on after the context, and goes on to announce each step itself.
        return self._is_on and self._ddp._join_config.enable

    def __call__(self, **kwargs: Any) -> Any:
        """Return what a rank without data does, in the form of a torch JoinHook."""
        hook = self._below(**kwargs)
        return _Both(hook, self) if self._is_on else hook

    def shadows_step(self) -> bool:
        """Return whether the step that DDP just shadowed reduced gradients, as its last one did."""
        return self._ddp.require_forward_param_sync

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
    """The hook of the model, and then that of the guard."""

    def __init__(self, hook: Any, shadow: JoinShadow) -> None:
        self._hook, self._shadow = hook, shadow

    def main_hook(self) -> None:
        """Shadow one step of the other ranks."""
        self._hook.main_hook()
        if self._shadow.shadows_step():
            self._shadow.be_absent()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Become like a rank that had data to the end."""
        self._hook.post_hook(is_last_joiner)
        self._shadow.rejoin(is_last_joiner)
