"""Run a backward pass without the hooks that the user put on gradients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from safestep.capture.unwinding import undone

_TABLES = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def without_gradient_hooks(module: nn.Module, params: Sequence[Tensor]) -> Iterator[None]:
    """Take hooks on gradients off a module, its submodules and parameters, until exit.

    They may count calls, draw noise from a generator of their own or collect statistics: one call
    more would change the training.

    Args:
        module: The root module.
        params: The parameters.

    Yields:
        Nothing.
    """
    children = [it for it in module.modules() if not isinstance(it, torch.jit.ScriptModule)]
    held = [(child, name, getattr(child, name)) for child in children for name in _TABLES]
    of_tensors = [(param, "_backward_hooks", param._backward_hooks) for param in params]
    hooked = [(owner, name, hooks) for owner, name, hooks in (*held, *of_tensors) if hooks]

    def put_back() -> None:
        for owner, name, hooks in hooked:
            setattr(owner, name, hooks)

    with undone(put_back):
        for owner, name, _ in hooked:
            # A tensor knows its table; without one it has no hooks.
            setattr(owner, name, None if isinstance(owner, Tensor) else OrderedDict())
        yield
