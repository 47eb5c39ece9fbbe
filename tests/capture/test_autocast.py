"""Autocast is where it was, also where an interrupt struck inside a region's entry or exit."""

import pytest
import torch

from safestep.capture.autocast import autocast_regions, autocast_state


def depth():
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@pytest.mark.parametrize("outside", [False, True])
def test_a_region_that_was_never_left_is_left(outside):
    with torch.autocast("cpu", torch.float16, enabled=outside):
        before = autocast_regions(), torch.is_autocast_cache_enabled(), depth()
        put_back = autocast_state()
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False).__enter__()

        put_back()
        put_back()  # once more, as after an interrupt

        assert (autocast_regions(), torch.is_autocast_cache_enabled(), depth()) == before
