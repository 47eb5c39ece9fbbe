"""A lower bound of rung 4 from one pass over a row of many classes.

A histogram replaces a row in units of its spread (see ``safestep.radius.scan``): the classes whose
slopes share a bin of width d become one class at its middle; the heaviest class stays as it is.
With s and h the standard deviations of the slope in the row and in the histogram, both tilted by u,
a bin's share of the row is at most exp(|u| d) times its share of the histogram; by Minkowski,

    s(u) <= exp(|u| d / 2) (h(u) + d / 2).

Let r be the radius of the histogram, so that u^2 + pi^2 / (4 h(u)^2) >= r^2. For |u| < r then
pi^2 / (4 s(u)^2) >= k (r^2 - u^2) with k = exp(-r d) / (1 + r d / pi)^2 <= 1, and the row's radius
is at least sqrt(k) r: within 0.5 % of the histogram's for the radii that matter.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from safestep.radius.rows import CHUNK_ELEMENTS
from safestep.radius.scan import gap_bounds, nodes_at

# From a slice of the classes to the logits and the tangent of all rows, [N, size] each.
Block = Callable[[slice], tuple[Tensor, Tensor]]

BINS = 1024
_SCALE = BINS * (1 - 1e-5)  # a slope of 1, or slightly over by rounding, falls in the last bin
_WIDTH = 1.01 / BINS  # d, with room for rounding and for vanished weights:
# those under exp(-87) vanish in float32. At every node they add at most 1e-10 to the variance,
# and (d / 2)^2 is 2e-7.
_LOG2_E = math.log2(math.e)
_INDEX = torch.int32 if TorchVersion(torch.__version__) >= "2.8" else torch.int64
BLOCK_ELEMENTS = 1 << 17  # 512 KiB in float32
_REACH = 16.0
_NODES = 129  # close enough that the bound of a gap is only 0.1 % below its ends
# Rounding error of the variance from raw float64 moments; below the second, the skew is unusable.
_ROUNDING, _TOO_SMALL = 1e-13, 1e-9


def histogram(block: Block, classes: int, lowest: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of the heaviest class and the binned weights of the others.

    Reads the rows in blocks of classes that fit in a cache. The heaviest class so far is in no bin;
    all weights are relative to it and shrink when a heavier class is found.

    Args:
        block: Returns logits and tangent of a slice of the classes, ``[N, size]`` each. A class
            that does not exist has the logit -inf, and a tangent in the range of the others.
        classes: Number of classes.
        lowest: The lowest tangent of each row. Shape ``[N]``.
        spread: Highest minus lowest tangent, positive and finite. Shape ``[N]``.

    Returns:
        The weights, heaviest class first, ``[N, 1 + BINS]``; and the slope of the heaviest class in
        units of the spread, ``[N, 1]``. A row with NaN or a logit +inf has a NaN weight.
    """
    lowest, spread = lowest.unsqueeze(-1), spread.unsqueeze(-1)
    scale = (_SCALE / spread).clamp(max=torch.finfo(spread.dtype).max)
    binned = spread.new_zeros(len(spread), BINS)
    top = torch.full_like(spread, torch.finfo(spread.dtype).min)
    top_place = torch.zeros_like(spread)  # in bins
    size = BLOCK_ELEMENTS if spread.device.type == "cpu" else CHUNK_ELEMENTS
    size = max(1, size // len(spread))
    for begin in range(0, classes, size):
        logits, tangent = block(slice(begin, begin + size))
        place = (tangent - lowest).mul_(scale)
        highest = logits.amax(dim=-1, keepdim=True)
        rows = (highest > top).squeeze(-1).nonzero().squeeze(-1)
        found = logits[rows].argmax(dim=-1, keepdim=True)
        if len(rows) > 0:
            # The class that was the heaviest so far goes into its bin.
            heavier = highest[rows]
            loss = (top[rows] - heavier).exp()
            shrunk = binned[rows].mul_(loss)
            binned[rows] = shrunk.scatter_add_(-1, top_place[rows].to(_INDEX), loss)
            top[rows], top_place[rows] = heavier, place[rows].gather(-1, found)
        weight = (logits - top).mul_(_LOG2_E).exp2_()  # takes half the time of exp on a CPU
        weight[rows, found.squeeze(-1)] = 0.0
        binned.scatter_add_(-1, place.to(_INDEX), weight)
    top_weight = torch.ones_like(top).masked_fill_(top.isinf(), math.nan)
    return torch.cat([top_weight, binned], dim=-1), top_place / _SCALE


def coarse_radius(weight: Tensor, top_slope: Tensor) -> Tensor:
    """Return a lower bound of rung 4 in units of 1 / spread.

    The bins have the same slopes in every row, so one matrix product gives the moments of all rows
    at all nodes of a fixed grid. Gaps between nodes are bounded as in a scan.

    Args:
        weight: From ``histogram``, ``[N, 1 + BINS]``.
        top_slope: From ``histogram``, ``[N, 1]``.

    Returns:
        The bound, at most 16. Shape ``[N]``.

    Example:
        >>> slope = torch.linspace(0, 1, 5000)[None]
        >>> block = lambda classes: (torch.zeros(1, 5000)[:, classes], slope[:, classes])
        >>> weights = histogram(block, 5000, torch.zeros(1), torch.ones(1))
        >>> coarse_radius(*weights) > math.pi
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
    """Return powers ``[4]``, nodes ``[M]`` and the matrix that sums the moments, ``[BINS, 4 M]``.

    Slopes are measured from the middle of the row, which keeps cancellation in the variance small.
    """
    wide = {"dtype": torch.float64, "device": device}
    power = torch.arange(4, **wide)
    x = torch.linspace(-_REACH, _REACH, _NODES, **wide)
    offset = ((torch.arange(BINS, **wide) + 0.5) / _SCALE - 0.5).unsqueeze(-1)
    tilted = (offset**power).unsqueeze(-1) * (offset * x).exp().unsqueeze(1)
    return power, x, tilted.flatten(1)


def _ruled(over_half: Tensor) -> Tensor:
    """Return for each gap and the two rays, ``[N, M + 1]``, whether the class dominates all of it.

    From 0 outwards. The log-odds of the class are concave in x, so the two ends of a gap decide.
    """
    middle = over_half.shape[-1] // 2
    left, right = over_half[:, : middle + 1], over_half[:, middle:]
    left = left.flip(-1).cumprod(dim=-1)[:, 1:].flip(-1)
    ray = left.new_zeros(len(left), 1)
    return torch.cat([ray, left, right.cumprod(dim=-1)[:, 1:], ray], dim=-1).bool()
