"""Layer 0: rung 4 from below, at the cost of one look at a row of many classes.

A row in units of its spread (see ``safestep.scan``) is replaced by a histogram: the classes whose
slopes share a bin of width d become one class at its middle; one that may be over half stays.
With s and h the standard deviations of the slope in the row and in the histogram, both tilted by u,
a bin's share of the row is at most exp(|u| d) times its share of the histogram; by Minkowski,

    s(u) <= exp(|u| d / 2) (h(u) + d / 2).

Let r be the radius of the histogram, so that u^2 + pi^2 / (4 h(u)^2) >= r^2. For |u| < r then
pi^2 / (4 s(u)^2) >= k (r^2 - u^2) with k = exp(-r d) / (1 + r d / pi)^2 <= 1, and the row's radius
is at least sqrt(k) r: within 0.5 % of the histogram's for the radii that matter.
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from safestep.scan import gap_bounds, nodes_at

BINS = 1024
_SCALE = BINS * (1 - 1e-5)  # a slope of 1, and one a little over by rounding, is in the last bin
_WIDTH = 1.01 / BINS  # d, with room for rounding and for vanished weights:
# those under exp(-87) vanish in float32. Up to the last node a tilt cannot raise what they add to
# the variance over 1e-10, and (d / 2)^2 is 2e-7.
_LOG2_E = math.log2(math.e)
_INDEX = torch.int32 if TorchVersion(torch.__version__) >= "2.8" else torch.int64
_REACH = 16.0
_NODES = 129  # so near to each other that the bound of a gap is 0.1 % below its ends
# Variance that raw moments in float64 may miss, and that below which their third one says nothing.
_ROUNDING, _TOO_SMALL = 1e-13, 1e-9


def histogram(log_weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of a class that may hold over half, if any does, and of bins of the rest.

    What is given is overwritten, so that less has to be in the cache.

    Args:
        log_weight: Logits of rows, 0 for the heaviest class, -inf for a dead one. Shape ``[N, C]``.
        slope: Tangent in units of its spread, in [0, 1]. Shape ``[N, C]``.

    Returns:
        Weights, that of the one class first, ``[N, 1 + BINS]``; and its slope, ``[N, 1]``.
    """
    weight = log_weight.mul_(_LOG2_E).exp2_()  # in half the time of exp on a CPU
    top_weight, top_slope = slope.new_zeros(2, len(slope), 1).unbind()
    is_ruled = weight.sum(dim=-1) < 2
    if is_ruled.any():
        # There one weight alone is 1. Its place is found sooner than by argmax.
        row, top = (weight == 1).nonzero().unbind(-1)
        row, top = row[is_ruled[row]], top[is_ruled[row]]
        top_weight[row, 0], top_slope[row, 0] = 1.0, slope[row, top]
        weight[row, top] = 0.0
    bins = slope.mul_(_SCALE).to(_INDEX)
    binned = slope.new_zeros(len(slope), BINS).scatter_add_(-1, bins, weight)
    return torch.cat([top_weight, binned], dim=-1), top_slope


def coarse_radius(weight: Tensor, top_slope: Tensor) -> Tensor:
    """Return a lower bound of rung 4 in units of 1 / spread.

    The bins have the same slopes in every row, so that the moments of all rows at all nodes of a
    fixed grid are one product of matrices. Gaps between nodes are bounded as in a scan.

    Args:
        weight: From ``histogram``, ``[N, 1 + BINS]``.
        top_slope: From ``histogram``, ``[N, 1]``.

    Returns:
        The bound, at most 16. Shape ``[N]``.

    Example:
        >>> slope = torch.linspace(0, 1, 5000)[None]
        >>> coarse_radius(*histogram(torch.zeros(1, 5000), slope)) > math.pi
        tensor([True])
    """
    power, x, tilted = _grid(weight.device)
    sums = (weight[:, 1:].double() @ tilted).unflatten(-1, (4, _NODES))
    top_offset = top_slope.double() - 0.5
    top = weight[:, :1] * (top_offset * x).exp()
    searched = ~_ruled(sums[:, 0] * (x.abs() * _WIDTH / 2).exp() < top)
    sums = sums + (top_offset**power).unsqueeze(-1) * top.unsqueeze(1)
    mean, second, third = (sums[:, 1:] / sums[:, :1]).unbind(1)
    variance = (second - mean.square()).clamp(min=0) + _ROUNDING
    skew = (third - 3 * mean * second + 2 * mean**3) / variance
    skew = skew.masked_fill(variance < _TOO_SMALL, math.nan)
    nodes = nodes_at(x.expand_as(mean), mean + 0.5, variance.log(), skew)
    bound, _ = gap_bounds(nodes, searched)
    radius = (bound.amin(dim=-1) / 2).exp()
    shrunk = radius * (-radius * _WIDTH / 2).exp() / (1 + radius * _WIDTH / math.pi)
    return shrunk.to(weight.dtype)


@cache
def _grid(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return powers ``[4]``, nodes ``[M]`` and what sums all bins' moments, ``[BINS, 4 M]``.

    The moments are those of slopes from the middle of the row, so that little is lost in the
    variance.
    """
    wide = {"dtype": torch.float64, "device": device}
    power = torch.arange(4, **wide)
    x = torch.linspace(-_REACH, _REACH, _NODES, **wide)
    offset = ((torch.arange(BINS, **wide) + 0.5) / _SCALE - 0.5).unsqueeze(-1)
    tilted = (offset**power).unsqueeze(-1) * (offset * x).exp().unsqueeze(1)
    return power, x, tilted.flatten(1)


def _ruled(over_half: Tensor) -> Tensor:
    """Return for each gap and the two rays, ``[N, M + 1]``, whether the class rules all of it.

    From 0 outwards; the logarithm of its odds is concave in x, so that both ends tell.
    """
    middle = over_half.shape[-1] // 2
    left, right = over_half[:, : middle + 1], over_half[:, middle:]
    left = left.flip(-1).cumprod(dim=-1)[:, 1:].flip(-1)
    ray = left.new_zeros(len(left), 1)
    return torch.cat([ray, left, right.cumprod(dim=-1)[:, 1:], ray], dim=-1).bool()
