"""Find the optimizer whose step hooks fire, and tell nested calls of its step apart."""

from __future__ import annotations

import sys
from typing import Any

from torch.optim import Optimizer

# The code of torch's wrapper around every step(), which calls the hooks.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def is_within_step(optimizer: Optimizer) -> bool:
    """Return whether the running step hook belongs to a step that another step called.

    Args:
        optimizer: The optimizer, whose ``step`` may call ``super().step``.

    Returns:
        True in the hooks of the inner step.
    """
    frame, steps = sys._getframe(), 0
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer:
            steps += 1
        frame = frame.f_back
    return steps > 1


def hooked_optimizer(optimizer: Any) -> Any:
    """Return the optimizer whose step hooks fire, inside wrappers such as Accelerate's.

    Args:
        optimizer: An optimizer, or a wrapper that holds one in ``.optimizer``.

    Returns:
        The optimizer to register hooks on.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        # Fabric's wrapper shows the hooks of the optimizer inside as its own.
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
        if hooks is not None and hooks is not getattr(inner, "_optimizer_step_pre_hooks", None):
            break
        optimizer = inner
    return optimizer
