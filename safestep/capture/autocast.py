"""Read autocast's state, and put it back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from safestep._torch import is_any_autocast_enabled

_DEVICES = ("cpu", "cuda")


def autocast_regions() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the devices that autocast is on for, each with its type."""
    if not is_any_autocast_enabled():
        return ()
    return tuple(
        (device_type, torch.get_autocast_dtype(device_type))
        for device_type in _DEVICES
        if torch.is_autocast_enabled(device_type)
    )


def autocast_state() -> Callable[[], None]:
    """Return a function that puts autocast back to where it is now.

    An interrupt may strike inside a region's entry or exit. Left one region too deep, autocast
    would never clear its cache of weights, and training would go on with old ones.

    Example:
        >>> put_back = autocast_state()
        >>> _ = torch.autocast("cpu").__enter__()
        >>> put_back()
        >>> torch.is_autocast_enabled("cpu"), _depth()
        (False, 0)
    """
    modes = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    return partial(_put_back, modes, torch.is_autocast_cache_enabled(), _depth())


def _put_back(modes: list[tuple[str, bool, torch.dtype]], caches: bool, depth: int) -> None:
    for device_type, is_on, dtype in modes:
        torch.set_autocast_enabled(device_type, is_on)
        torch.set_autocast_dtype(device_type, dtype)
    torch.set_autocast_cache_enabled(caches)
    while _depth() > depth:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


def _depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
