"""Hooks that stay out of copies and compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class DetachableHook:
    """A hook that does nothing in a copy of the module it is on.

    Otherwise ``copy.deepcopy(model)`` or a pickle of the model would hold the hook's owner: the
    controller, the optimizer and its state.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function
        # A compiled optimizer step or model must not trace the guard.
        self._untraced = torch.compiler.disable(function) if function is not None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the function; None in a copy."""
        function = self._untraced if torch.compiler.is_compiling() else self._function
        return function(*args, **kwargs) if function is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> DetachableHook:
        return DetachableHook(None)

    def __reduce__(self) -> tuple[type[DetachableHook], tuple[None]]:
        return DetachableHook, (None,)
