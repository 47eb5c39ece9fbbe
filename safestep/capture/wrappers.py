"""Find the user's module inside data-parallel and torch.compile wrappers."""

from __future__ import annotations

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
