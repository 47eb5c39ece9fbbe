"""Layer 0: rung 4 from below, at the cost of one look at a row of many classes.

A row in units of its spread (see ``safestep.scan``) is replaced by a histogram: the classes whose
slopes share a bin of width d become one class at its middle; the heaviest class stays as it is.
With s and h the standard deviations of the slope in the row and in the histogram, both tilted by u,
a bin's share of the row is at most exp(|u| d) times its share of the histogram; by Minkowski,

    s(u) <= exp(|u| d / 2) (h(u) + d / 2).

Let r be the radius of the histogram, so that u^2 + pi^2 / (4 h(u)^2) >= r^2. For |u| < r then
pi^2 / (4 s(u)^2) >= k (r^2 - u^2) with k = exp(-r d) / (1 + r d / pi)^2 <= 1, and the row's radius
is at least sqrt(k) r: within 0.5 % of the histogram's for the radii that matter.
"""

import math

import torch
from torch import Tensor

from safestep.scan import dominated_interval, scan_minimum

BINS = 1024
# Weights under exp(-87) vanish in float32. Up to this radius a tilt cannot raise what they add to
# the variance over 1e-10, and (d / 2)^2 is 2e-7.
_LARGEST = 30.0


def coarse_radius(log_weight: Tensor, slope: Tensor) -> Tensor:
    """Return a lower bound of rung 4 in units of 1 / spread.

    Args:
        log_weight: Logits of rows, 0 for the heaviest class, -inf for a dead one. Shape ``[N, C]``.
        slope: Tangent in units of its spread, in [0, 1]. Shape ``[N, C]``.

    Returns:
        The bound, at most 30. Shape ``[N]``.

    Example:
        >>> slope = torch.linspace(0, 1, 5000)[None]
        >>> coarse_radius(torch.zeros(1, 5000), slope) > math.pi
        tensor([True])
    """
    width = 1.01 / BINS  # more than a bin's, for rounding and vanished weights
    weight, slope = _histogram(log_weight, slope)
    # A bin that holds more than half may be many classes: only one class can rule out zeros.
    is_class = weight.argmax(dim=-1) == 0
    left, right = (
        torch.where(is_class, end, 0.0)
        for end in dominated_interval(weight, slope, margin=width / 2)
    )
    radius = scan_minimum(weight, slope, left, right, inside=False).clamp(max=_LARGEST)
    return radius * (-radius * width / 2).exp() / (1 + radius * width / math.pi)


def _histogram(log_weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-weights and slopes ``[N, 1 + BINS]``: the heaviest class and the bins."""
    top_weight, top = log_weight.max(dim=-1, keepdim=True)
    bins = (slope * BINS).to(torch.int64).clamp_(max=BINS - 1)
    weight = log_weight.exp().scatter_(-1, top, 0.0)
    weight = slope.new_zeros(len(slope), BINS).scatter_add_(-1, bins, weight)
    middles = (torch.arange(BINS, device=slope.device, dtype=slope.dtype) + 0.5) / BINS
    return (
        torch.cat([top_weight, weight.log()], dim=-1),
        torch.cat([slope.gather(-1, top), middles.expand_as(weight)], dim=-1),
    )
