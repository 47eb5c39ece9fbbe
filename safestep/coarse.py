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


def histogram(log_weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of fewer classes: one that may hold over half, if any does, and bins of the rest.

    Args:
        log_weight: Logits of rows, 0 for the heaviest class, -inf for a dead one. Shape ``[N, C]``.
        slope: Tangent in units of its spread, in [0, 1]. Shape ``[N, C]``.

    Returns:
        Their log-weights and slopes. Shape ``[N, 1 + BINS]`` each.
    """
    weight = log_weight.exp()
    top_slope = slope.new_zeros(len(slope), 1)
    top_weight = torch.full_like(top_slope, -math.inf)  # none
    if (weight.sum(dim=-1) < 2).any():
        top = log_weight.argmax(dim=-1, keepdim=True)
        top_weight, top_slope = log_weight.gather(-1, top), slope.gather(-1, top)
        weight.scatter_(-1, top, 0.0)
    scale = BINS * (1 - 1e-5)  # a slope of 1, and one a little over by rounding, is in the last bin
    bins = (slope * scale).to(torch.int64)
    weight = slope.new_zeros(len(slope), BINS).scatter_add_(-1, bins, weight)
    middles = (torch.arange(BINS, device=slope.device, dtype=slope.dtype) + 0.5) / scale
    return (
        torch.cat([top_weight, weight.log()], dim=-1),
        torch.cat([top_slope, middles.expand_as(weight)], dim=-1),
    )


def coarse_radius(log_weight: Tensor, slope: Tensor, enough: Tensor | None = None) -> Tensor:
    """Return a lower bound of rung 4, in units of 1 / spread, from the histograms of rows.

    Args:
        log_weight: From ``histogram``. Shape ``[N, 1 + BINS]``.
        slope: From ``histogram``. Shape ``[N, 1 + BINS]``.
        enough: Bound of each row, ``[N]``, that need not be improved upon.

    Returns:
        The bound, at most 30. Shape ``[N]``.

    Example:
        >>> slope = torch.linspace(0, 1, 5000)[None]
        >>> coarse_radius(*histogram(torch.zeros(1, 5000), slope)) > math.pi
        tensor([True])
    """
    width = 1.01 / BINS  # more than a bin's, for rounding and vanished weights
    # A bin that holds more than half may be many classes: only one class can rule out zeros.
    is_class = log_weight.argmax(dim=-1) == 0
    left, right = (
        torch.where(is_class, end, 0.0)
        for end in dominated_interval(log_weight, slope, margin=width / 2)
    )
    if enough is not None:
        enough = enough.clamp(max=_LARGEST)
        enough = 1.001 * enough.square() / _shrunk(enough, width)  # what a histogram has to have
    radius = scan_minimum(log_weight, slope, left, right, inside=False, enough=enough)
    return _shrunk(radius.clamp(max=_LARGEST), width)


def _shrunk(radius: Tensor, width: float) -> Tensor:
    """Return the radius that a histogram of this radius proves for its row."""
    return radius * (-radius * width / 2).exp() / (1 + radius * width / math.pi)
