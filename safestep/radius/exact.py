"""Rung 5, the modulus of the nearest complex zero, found by counting zeros in discs.

Let F(t) = sum_k w_k exp(a_k t) with slopes a_k in [0, 1]. The code uses G(t) = F(t) exp(-t/2),
which has the same zeros and the slopes b_k = a_k - 1/2 in [-1/2, 1/2]. At t = u + iy, with q the
weights w_k exp(a_k u) normalised to sum to 1,

    G(t) = (a positive number) * phi(t),  phi(t) = sum_k q_k exp(i y b_k),  |phi| <= 1.

The number of zeros in a disc is the winding number of G along its rim. The change of arg G along an
arc is certain in two cases: the arc lies within 2 log(1 + |phi|) of a point, where G changes by
less than its own size and so cannot vanish; or one class outweighs all others along the arc.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from safestep.radius.bounds import certified_radius
from safestep.radius.rows import CHUNK_ELEMENTS, climb_rows

_TOLERANCE = 1e-6  # relative gap between the two counting discs, just inside and just outside
_MAX_ROUNDS = 60
_MAX_FAILURES = 4  # failed counts after which a row is given up
_MAX_HALVINGS = 50
_MAX_ARCS = 1 << 12  # undecided arcs of a row at one time; more means a multiple zero nearby
_NEWTON_STEPS = 30


def exact_radius(logits: Tensor, logit_tangent: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return rung 5, the distance to the nearest complex zero of the partition function.

    radius = min |t| over the complex t with sum_k softmax(logits)_k exp(t a_k) = 0. A diagnostic:
    it works in float64 and costs hundreds of softmaxes a row. Each value is verified: by the
    argument principle no zero is nearer than (1 - 1e-6) times it, and one is within (1 + 1e-6).

    Args:
        logits: Numbers that enter the softmax, shape ``[*B, C]``.
        logit_tangent: Their directional derivative a, shape ``[*B, C]``.
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool.

    Returns:
        The radius. Shape ``[*B]``, float64, in multiples of the tangent, at least
        ``certified_radius``. NaN where no value could be verified: a double zero is such a case.

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Prop. 4.2.

    Example:
        >>> import torch
        >>> exact_radius(torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([5.0862], dtype=torch.float64)
    """
    logits, logit_tangent = logits.double(), logit_tangent.double()
    return climb_rows("exact_radius", _nearest_zero, logits, logit_tangent, mask)


class _Point(NamedTuple):
    """Points t = u + iy, each with its own row of weights; each field has shape ``[M]``."""

    t: Tensor
    phi: Tensor
    newton: Tensor  # the step that Newton's iteration for F would take
    top: Tensor  # the class of the largest weight
    top_weight: Tensor
    top_slope: Tensor  # its b


def _nearest_zero(log_weight: Tensor, slope: Tensor) -> Tensor:
    """Return the modulus of the nearest zero, shape ``[N]``; NaN where it cannot be verified.

    Counts of zeros bracket the modulus in [low, high]. Each round counts in one more disc: just
    inside or just outside the zero that Newton's iteration found, else in between. The iteration
    only guesses; the counts decide.
    """
    certified = certified_radius(log_weight, slope)
    low, high = certified * (1 - 1e-12), torch.full_like(certified, math.inf)
    result, guess = torch.full_like(low, math.nan), torch.full_like(low, math.nan)
    failures = torch.zeros_like(low)
    # Far from the origin, zeros on one vertical line differ little in modulus.
    tolerance = _TOLERANCE * math.pi / low
    rows = torch.arange(len(low), device=low.device)
    for number in range(_MAX_ROUNDS):
        trial = _next_radius(low, high, guess, tolerance, number)
        count, start = _zeros_inside(log_weight, slope, trial)
        low, high = torch.where(count == 0, trial, low), torch.where(count > 0, trial, high)
        found = _newton(log_weight, slope, start).abs()
        guess = torch.where((guess >= low) & (guess <= high), guess, found)
        # After a failed count, the next disc lies in between; the same one would fail again.
        guess = guess.masked_fill(count.isnan(), math.nan)
        failures = failures + count.isnan()
        done = high <= low * (1 + 3 * tolerance)
        value = torch.where((guess >= low) & (guess <= high), guess, (low + high) / 2)
        result[rows[done]] = torch.maximum(value[done], certified[rows[done]])
        left = ~done & (failures < _MAX_FAILURES)
        if not left.any():
            break
        log_weight, slope, rows, tolerance = (
            each[left] for each in (log_weight, slope, rows, tolerance)
        )
        low, high, guess, failures = low[left], high[left], guess[left], failures[left]
    return result


def _next_radius(
    low: Tensor, high: Tensor, guess: Tensor, tolerance: Tensor, number: int
) -> Tensor:
    """Return the radius of the next disc to count in, between low and high."""
    portion = 0.5 if number % 2 else 0.38
    room = torch.where(high.isinf(), 2.0 ** (number + 1), portion * (high.square() - low.square()))
    trial = (low.square() + room).sqrt()
    for offer in (guess * (1 + tolerance), guess * (1 - tolerance)):
        trial = torch.where((offer > low) & (offer < high), offer, trial)
    return trial


def _evaluate(log_weight: Tensor, slope: Tensor, rows: Tensor, t: Tensor) -> _Point:
    """Return the given rows evaluated at the points ``t``, in chunks that bound the memory."""
    size = max(1, CHUNK_ELEMENTS // slope.shape[-1])
    parts = []
    for row, at in zip(rows.split(size), t.split(size), strict=True):
        a = slope[row]
        weight = (log_weight[row] + a * at.real.unsqueeze(-1)).softmax(dim=-1)
        terms = torch.polar(weight, (a - 0.5) * at.imag.unsqueeze(-1))
        phi = terms.sum(dim=-1)
        top_weight, top = weight.max(dim=-1)
        top_slope = a.gather(-1, top.unsqueeze(-1)).squeeze(-1) - 0.5
        newton = phi / (terms * a).sum(dim=-1)
        parts.append((at, phi, newton, top, top_weight, top_slope))
    return _Point(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _newton(log_weight: Tensor, slope: Tensor, start: Tensor) -> Tensor:
    """Return the end of Newton's iteration for F from ``start`` ``[N]``; steps are at most 1."""
    rows = torch.arange(len(start), device=start.device)
    t = start
    for _ in range(_NEWTON_STEPS):
        step = _evaluate(log_weight, slope, rows, t).newton
        t = t - step / step.abs().clamp(min=1)
        if not (step.abs() > 1e-15 * t.abs()).any():
            break
    return t


def _zeros_inside(log_weight: Tensor, slope: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of zeros with |t| < radius and the point of the rim with the least |phi|.

    Both have shape ``[N]``. F is real on the real axis, so along the upper half of the rim arg G
    changes by pi per zero. Arcs are halved until each change is certain; NaN if one stays open.
    """
    pieces = 8
    angle = torch.linspace(0, math.pi, pieces + 1, dtype=radius.dtype, device=radius.device)
    rows = torch.arange(len(radius), device=radius.device).repeat_interleave(pieces)
    first, last = angle[:-1].repeat(len(radius)), angle[1:].repeat(len(radius))
    turn = torch.zeros_like(radius)
    least, least_at = (
        torch.full_like(radius, math.inf),
        torch.polar(radius, torch.ones_like(radius)),
    )
    at_first, at_last = (
        _evaluate(log_weight, slope, rows, torch.polar(radius[rows], end)) for end in (first, last)
    )
    for _ in range(_MAX_HALVINGS):
        half = (first + last) / 2
        at_half = _evaluate(log_weight, slope, rows, torch.polar(radius[rows], half))
        certain, change = _turn(at_first, at_half, at_last, radius[rows] * (last - first) / 2)
        turn.index_add_(0, rows[certain], change[certain])
        smaller = torch.full_like(least, math.inf)
        smaller.scatter_reduce_(0, rows, at_half.phi.abs(), "amin")
        record = (at_half.phi.abs() == smaller[rows]) & (smaller < least)[rows]
        least_at[rows[record]] = at_half.t[record]
        least = torch.minimum(least, smaller)
        crowded = rows[~certain].bincount(minlength=len(radius)) > _MAX_ARCS
        turn[crowded] = math.nan
        open_ = ~certain & ~crowded[rows]
        if not open_.any():
            break
        rows = rows[open_].repeat(2)
        first, last = torch.cat([first[open_], half[open_]]), torch.cat([half[open_], last[open_]])
        at_first, at_last = _join(at_first, at_half, open_), _join(at_half, at_last, open_)
    else:
        turn[rows] = math.nan
    return (turn / math.pi).round(), least_at


def _join(one: _Point, other: _Point, keep: Tensor) -> _Point:
    return _Point(*(torch.cat([a[keep], b[keep]]) for a, b in zip(one, other, strict=True)))


def _turn(first: _Point, half: _Point, last: _Point, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether the change of arg G along each arc is certain, and the change.

    Args:
        first: Where the arc begins.
        half: Its middle.
        last: Where it ends.
        reach: Upper bound of the distance from the middle to any point of the arc.
    """
    close = reach < 2 * half.phi.abs().log1p() * (1 - 1e-9)
    # A class that outweighs the rest at both ends does so in between: the odds are convex in u.
    floor = 0.5 + 1e-9
    ruled = (first.top == last.top) & (first.top_weight > floor) & (last.top_weight > floor)
    spin = torch.where(ruled, first.top_slope, 0.0)
    begin = first.phi * torch.polar(torch.ones_like(reach), -spin * first.t.imag)
    end = last.phi * torch.polar(torch.ones_like(reach), -spin * last.t.imag)
    return close | ruled, spin * (last.t.imag - first.t.imag) + (end / begin).angle()
