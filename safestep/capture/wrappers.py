"""Find the user's module inside data-parallel and torch.compile wrappers."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn


def without_data_parallel(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and Fabric wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_forward_module", None), nn.Module):
            model = inner  # of Lightning Fabric, with DistributedDataParallel inside
        else:
            return model


def eager_module(model: nn.Module) -> nn.Module:
    """Return the user's own module, inside data-parallel and torch.compile wrappers."""
    model = without_data_parallel(model)
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = without_data_parallel(original)
    return model


def calls_under_way(module: nn.Module) -> int:
    """Return how many calls of a module are under way in this thread, one inside the other."""
    found = 0
    step: FrameType | None = sys._getframe()
    while step is not None:
        if step.f_code.co_name == "_call_impl" and step.f_locals.get("self") is module:
            found += 1
        step = step.f_back
    return found
