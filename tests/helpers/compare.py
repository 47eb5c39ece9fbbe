"""Compare what two runs left behind."""

import torch


def assert_bitwise_equal(actual, expected, *, equal_nan=False):
    """Compare every tensor and number of two nested structures without a tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=equal_nan)
