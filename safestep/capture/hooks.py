"""Hooks that stay out of copies and compiled code, and a gradient hook for every step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DetachableHook:
    """A hook that does nothing in a copy of the module it is on.

    ``copy.deepcopy(model)`` for an averaged model, or pickling a model, would otherwise copy the
    hook's owner: the controller, the optimizer and its state.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function
        # A compiled optimizer step or model must not trace what the guard does.
        self._untraced = torch.compiler.disable(function) if function is not None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, None if this is a copy."""
        function = self._untraced if torch.compiler.is_compiling() else self._function
        return function(*args, **kwargs) if function is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> DetachableHook:
        return DetachableHook(None)

    def __reduce__(self) -> tuple[type[DetachableHook], tuple[None]]:
        return DetachableHook, (None,)


def hook_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Let a hook see the gradient of a tensor, for as long as the tensor's graph lives.

    Args:
        tensor: A tensor that is no leaf.
        hook: What is called with the gradient.
    """
    if type(tensor) is Tensor and tensor._backward_hooks is None:
        # What register_hook does without a handle, which takes longer to make than all the rest.
        tensor._backward_hooks = OrderedDict({_KEY: hook})
        tensor.grad_fn._register_hook_dict(tensor)  # type: ignore[union-attr]
    else:
        tensor.register_hook(hook)


_KEY = -1  # handles count from 0
