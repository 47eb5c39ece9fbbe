"""A rigorous lower bound of the strip's minimum along the real line, for many rows at once.

A row is given in units of its spread: log-weights ``[N, C]`` (-inf for a dead class) and slopes
``[N, C]`` in [0, 1] that reach both ends. With q = softmax(log_weight + x slope) and s(x)^2 the
variance of the slope under q, every complex zero x + i y of sum_k exp(log_weight_k + slope_k t) has

    |t|^2 >= f(x) = x^2 + pi^2 / (4 s(x)^2).

A scan of f is rigorous because the curvature of w = log f is bounded below: w'' >= -1/4.
Proof: let l = log s^2 and let e = slope - mean. In an exponential family l' is the mean and
l'' + 3 s^2 the variance of e under the weights q e^2 / s^2, so l'' <= 1/4 - 3 s^2 (Popoviciu). With
v = pi^2 / (4 s^2) one finds w'' = -2/f - v l''/f + v (x l' + 2)^2 / f^2, hence
w'' >= -v / (4 f) + (3 pi^2/4 - 2) / f >= -1/4.
Between two nodes, a parabola from each bounds w from below; a linear equation gives where they
meet.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

# The scan stops once its value is within 0.25 % of the true minimum (twice that in w = log f) ...
_TOLERANCE = 5e-3
# ... or after this many rounds; the result is a lower bound whenever it stops.
_MAX_ROUNDS = 100
_LOG_QUARTER_PI_SQUARED = math.log(math.pi**2 / 4)


class Nodes(NamedTuple):
    """Points of the scan, each field of shape ``[N, M]``, ascending in x."""

    x: Tensor
    value: Tensor  # w = log f
    slope: Tensor  # dw/dx
    mean: Tensor  # of the slopes under q
    log_variance: Tensor  # log s^2


def tilted_moments(log_weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, log-variance and d(log-variance)/dx of ``slope`` under softmax(log_weight).

    Deviations are taken from the heaviest class; classes with its slope count as one class. The
    others are weighed relative to the heaviest among them: a probability of exp(-10000) then still
    counts in the variance, where 1 - p would lose it.
    """
    log_probability = log_weight.log_softmax(dim=-1)
    heaviest = slope.gather(-1, log_probability.argmax(dim=-1, keepdim=True))
    offset = slope - heaviest
    weight = log_probability.masked_fill_(offset == 0, -math.inf)
    unit = weight.amax(dim=-1, keepdim=True)  # largest log-probability of the others
    weight = weight.sub_(unit).exp_()
    log_rest = (unit.exp() * weight.sum(dim=-1, keepdim=True)).clamp(max=1).neg().log1p()
    mean_offset = unit.exp() * vecdot(weight, offset).unsqueeze(-1)
    deviation = offset.sub_(mean_offset)
    weighted = weight.mul_(deviation)
    square = vecdot(weighted, deviation)
    cube = vecdot(weighted.mul_(deviation), deviation)
    # The term of the heaviest class, with its weight in the same unit.
    unit, log_ratio, mean_offset = (
        each.squeeze(-1) for each in (unit, log_rest - unit, mean_offset)
    )
    log_deviation = mean_offset.abs().log()
    square = square + (log_ratio + 2 * log_deviation).exp()
    cube = cube - mean_offset.sign() * (log_ratio + 3 * log_deviation).exp()
    return heaviest.squeeze(-1) + mean_offset, square.log() + unit, cube / square


def dominated_interval(log_weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends (left <= 0 <= right, ``[N]`` each) of the x at which one class is over half.

    Follows only the class that is over half at x = 0. Both ends are 0 if there is none; an end is
    infinite if the class stays over half. Up to rounding, the interval is never too long.
    """
    top_log_weight, top = log_weight.max(dim=-1, keepdim=True)
    odds = (log_weight - top_log_weight).scatter(-1, top, -math.inf)
    at_zero = odds.logsumexp(dim=-1)
    left, right = torch.zeros_like(at_zero), torch.zeros_like(at_zero)
    rows = (at_zero < 0).nonzero().squeeze(-1)
    if len(rows) > 0:
        odds, gain = odds[rows], slope[rows] - slope[rows].gather(-1, top[rows])
        right[rows] = _parity_point(odds, gain, at_zero[rows])
        left[rows] = -_parity_point(odds, -gain, at_zero[rows])
    return left, right


def _parity_point(odds: Tensor, gain: Tensor, at_zero: Tensor) -> Tensor:
    """Return the smallest x > 0 with g(x) = logsumexp(odds + gain x) = 0, or inf, from below.

    g is convex and negative at 0. Newton from a point beyond the root comes down to it from above;
    the chord from (0, g(0)) to where it stopped then cuts the axis on the near side of the root.
    """
    crossing = torch.where((gain > 0) & (odds > -math.inf), -odds / gain, math.inf)
    x = crossing.amin(dim=-1)
    exists = x.isfinite()
    x = torch.where(exists, x, 0.0)
    for _ in range(20):
        exponent = odds + gain * x.unsqueeze(-1)
        value = exponent.logsumexp(dim=-1)
        rate = (exponent.softmax(dim=-1) * gain).sum(dim=-1)
        chord = x * at_zero / (at_zero - value.clamp(min=0))
        newton = torch.where(value > 0, x - value / rate, x)
        if not (exists & (newton < x * (1 - 4 * torch.finfo(x.dtype).eps))).any():
            break
        x = newton
    return torch.where(exists, chord, math.inf)


def scan_minimum(
    log_weight: Tensor,
    slope: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    inside: bool,
    enough: Tensor | None = None,
) -> Tensor:
    """Return a lower bound ``[N]`` of sqrt(f) over the x outside (or inside) the interval.

    Best first: each round adds a node where the lower bound of a row is smallest, until that bound
    is within the tolerance of the smallest value seen. On a ray beyond the last node the bound is
    x^2 + pi^2, since s <= 1/2.

    Args:
        log_weight: Shape ``[N, C]``.
        slope: Shape ``[N, C]``, in [0, 1].
        left: Left end of the interval, shape ``[N]``, <= 0, may be -inf.
        right: Right end of the interval, shape ``[N]``, >= 0, may be inf.
        inside: Whether to search inside the interval or on the two rays outside.
        enough: Bound of each row, ``[N]``, at which its search may end.

    Returns:
        The lower bound, shape ``[N]``; inf if there is nothing to search.
    """
    ends = torch.stack([torch.nan_to_num(left, neginf=0.0), torch.nan_to_num(right, posinf=0.0)], 1)
    nodes = _evaluate(log_weight, slope, ends)
    searched = torch.stack([left.isfinite(), torch.zeros_like(left).bool(), right.isfinite()], 1)
    searched = ~searched if inside else searched
    result = torch.full_like(left, math.inf)
    aim = None if enough is None else 2 * enough.log()
    rows = torch.arange(len(left), device=left.device)
    for _ in range(_MAX_ROUNDS):
        bound, split = gap_bounds(nodes, searched)
        lowest, gap = bound.min(dim=-1)
        result[rows] = lowest
        seen = nodes.value.masked_fill(~(searched[:, 1:] | searched[:, :-1]), math.inf)
        active = lowest < seen.amin(dim=-1) - _TOLERANCE
        if aim is not None:
            active &= lowest < aim[rows]
        if not active.all():
            if not active.any():
                break
            rows, gap, split, searched = rows[active], gap[active], split[active], searched[active]
            log_weight, slope = log_weight[active], slope[active]
            nodes = Nodes(*(field[active] for field in nodes))
        gap = gap.unsqueeze(-1)
        new = _evaluate(log_weight, slope, split.gather(-1, gap))
        nodes = Nodes(*(_insert(old, gap, one) for old, one in zip(nodes, new, strict=True)))
        searched = _insert(searched, gap, searched.gather(-1, gap))
    return (result / 2).exp()


def _insert(old: Tensor, position: Tensor, new: Tensor) -> Tensor:
    """Return ``old`` ``[N, M]`` with ``new`` ``[N, 1]`` inserted before column ``position``."""
    column = torch.arange(old.shape[1] + 1, device=old.device)
    source = torch.where(column == position, old.shape[1], column - (column > position).long())
    return torch.cat([old, new], dim=1).gather(1, source)


def _evaluate(log_weight: Tensor, slope: Tensor, x: Tensor) -> Nodes:
    """Return the nodes at ``x`` ``[N, M]``, one column at a time to keep memory at ``[N, C]``."""
    columns = [tilted_moments(log_weight + slope * at.unsqueeze(-1), slope) for at in x.unbind(1)]
    return nodes_at(x, *(torch.stack(field, dim=1) for field in zip(*columns, strict=True)))


def nodes_at(x: Tensor, mean: Tensor, log_variance: Tensor, skew: Tensor) -> Nodes:
    """Return the nodes with these moments of the tilted slopes, each ``[N, M]``.

    Args:
        x: Where the nodes are.
        mean: Of the slopes.
        log_variance: log s^2.
        skew: d(log s^2)/dx.
    """
    # Where all weights but one vanish this overstates the variance: the bound is lower, but finite.
    log_variance = log_variance.clamp(min=-1e30)
    log_strip = _LOG_QUARTER_PI_SQUARED - log_variance
    value = torch.logaddexp(2 * x.abs().log(), log_strip)
    rate = 2 * x * (-value).exp() - (log_strip - value).exp() * skew
    return Nodes(x, value, rate, mean, log_variance)


def gap_bounds(nodes: Nodes, searched: Tensor) -> tuple[Tensor, Tensor]:
    """Return a lower bound of w in each gap and the point to split it at, both ``[N, M + 1]``.

    The first and last gap are the rays; gaps that are not searched are bounded by inf.
    """
    near, far = Nodes(*(f[:, :-1] for f in nodes)), Nodes(*(f[:, 1:] for f in nodes))
    # fmax: if the square of a wide gap overflows, only the tent bound remains.
    inner = torch.fmax(_parabola_bound(near, far), _tent_bound(near, far))
    ends = nodes.x[:, [0, -1]]
    rays = torch.logaddexp(2 * ends.abs().log(), torch.full_like(ends, 2 * math.log(math.pi)))
    bound = torch.cat([rays[:, :1], inner, rays[:, 1:]], dim=1)
    middle = (near.x + far.x) / 2
    beyond = 2 * ends + ends.new_tensor([-math.pi, math.pi])
    split = torch.cat([beyond[:, :1], middle, beyond[:, 1:]], dim=1)
    return bound.masked_fill(~searched, math.inf), split


def _parabola_bound(near: Nodes, far: Nodes) -> Tensor:
    """Return a lower bound of w between two nodes from w'' >= -1/4, where two parabolas meet."""
    width = far.x - near.x
    rise = near.value - far.value + far.slope * width + width.square() / 8
    at = rise / (far.slope - near.slope + width / 4).clamp(min=torch.finfo(width.dtype).tiny)
    at = torch.minimum(at.clamp(min=0), width)
    rest = width - at
    from_near = near.value + near.slope * at - at.square() / 8
    from_far = far.value - far.slope * rest - rest.square() / 8
    meeting = torch.minimum(from_near, from_far)
    return torch.minimum(meeting, torch.minimum(near.value, far.value))


def _tent_bound(near: Nodes, far: Nodes) -> Tensor:
    """Return a lower bound of w between two nodes from the slope of log s^2: for wide gaps.

    In an exponential family with values in [0, 1] that slope lies between -mean and 1 - mean, and
    the mean grows with x: right of a node log s^2 rises by 1 - mean(node) at most, left of one by
    mean(node). Besides, s^2 <= 1/4.
    """
    width = far.x - near.x
    up, down = 1 - near.mean, far.mean
    at = (far.log_variance - near.log_variance + down * width) / (up + down)
    at = torch.minimum(at.clamp(min=0), width)
    peak = near.log_variance + up * at
    peak = torch.maximum(peak, far.log_variance + down * (width - at)).clamp(max=math.log(0.25))
    nearest = torch.where(near.x * far.x <= 0, 0.0, torch.minimum(near.x.abs(), far.x.abs()))
    return torch.logaddexp(2 * nearest.log(), _LOG_QUARTER_PI_SQUARED - peak)
