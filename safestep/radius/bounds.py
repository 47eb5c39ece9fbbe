"""Lower bounds of the radius within which the Taylor series of the loss converges.

They form a ladder: each rung is at least the one before, and none exceeds the exact radius:
bound <= closed form <= strip <= certified <= exact. All take ``[*B, C]`` and return ``[*B]`` in the
inputs' common dtype, float32 for half precision. Conventions of all rungs:

- ``mask`` is bool, True where a row counts ``[*B]`` or a class exists ``[*B, C]``. A row that is
  masked or has fewer than two classes has spread 0 and radius inf, whatever its values.
- A class with logit -inf does not exist either; its tangent is ignored.
- NaN in the tangent or logits of a class that exists, an infinite tangent, a spread too large for
  the dtype and a logit +inf give NaN, never a number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from safestep.radius.histogram import BINS
from safestep.radius.rows import check_rows, climb_rows, row_spread
from safestep.radius.scan import dominated_interval, scan_minimum, tilted_moments
from safestep.radius.sources import ComputedRows, HeldRows, Source

_FEW = 16  # rows scanned before the remaining candidates are checked again


def logit_spread(logit_tangent: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the range of the logit tangent over the classes.

    spread = max_k a_k - min_k a_k, where a = J p and p is the tangent in parameter space.

    Args:
        logit_tangent: Directional derivative of the logits. Shape ``[*B, C]``. Unit: logits per
            parameter distance (unit tangent) or logits (proposed update).
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool.

    Returns:
        The spread. Shape ``[*B]``, never negative, in the input's unit; float32 for half precision.
        Zero means the softmax does not change along this tangent. NaN if it is not finite.

    Raises:
        ValueError: If there is no class, or the mask has another shape.
        TypeError: If the mask is not bool.

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Def. 4.4.

    Example:
        >>> import torch
        >>> logit_spread(torch.tensor([[0.5, -1.5, 0.0]]))
        tensor([2.])
    """
    check_rows("logit_spread", logit_tangent, mask)
    return row_spread(logit_tangent, mask)


def radius_bound(logit_tangent: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return rung 1, the radius that holds for every value of the logits.

    radius = pi / spread, infinite where the spread is zero.

    Args:
        logit_tangent: Directional derivative of the logits, shape ``[*B, C]``.
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool.

    Returns:
        The radius. Shape ``[*B]``, in multiples of the tangent: of the proposed update if the
        tangent is J times the update.

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Thm 4.6.

    Example:
        >>> import torch
        >>> radius_bound(torch.tensor([[0.5, -1.5, 0.0]]))
        tensor([1.5708])
    """
    return math.pi / logit_spread(logit_tangent, mask=mask)


def closed_form_radius(
    logits: Tensor, logit_tangent: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Return rung 2, which needs the spread and the tangent's variance under the softmax.

    With kappa = spread^2 / (4 variance) >= 1 and L = log kappa,
    radius = sqrt(L^2 + pi^2) / spread if L <= pi^2 / 2, else sqrt(x^2 + 2 x) / spread with
    x + log x = log(pi^2 / 2) + L.

    Args:
        logits: Numbers that enter the softmax, shape ``[*B, C]``.
        logit_tangent: Their directional derivative, shape ``[*B, C]``.
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool.

    Returns:
        The radius. Shape ``[*B]``, in multiples of the tangent, at least ``radius_bound``.

    Reference:
        The minimum over u of sqrt(u^2 + pi^2 / (4 s(u)^2)) with s(u)^2 bounded by
        min(spread^2 / 4, variance exp(spread |u|)).

    Example:
        >>> import torch
        >>> closed_form_radius(torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.5, -1.5, 0.0]]))
        tensor([2.0439])
    """
    return _closed_form_rows(logits, logit_tangent, mask)


def strip_radius(logits: Tensor, logit_tangent: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return rung 3, the distance from the origin to the edge of the zero-free region.

    radius = min over real u of sqrt(u^2 + pi^2 / (4 s(u)^2)), s(u)^2 the variance of the tangent a
    under softmax(logits + u a): no zero u + iy of the partition function has |y| < pi / (2 s(u)).
    A scan finds the minimum; its result is never above it, and at most 0.25 % below.

    Args:
        logits: Numbers that enter the softmax, shape ``[*B, C]``.
        logit_tangent: Their directional derivative, shape ``[*B, C]``.
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool.

    Returns:
        The radius. Shape ``[*B]``, in multiples of the tangent, at least ``closed_form_radius``.

    Example:
        >>> import torch
        >>> strip_radius(torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.5, -1.5, 0.0]]))
        tensor([2.3360])
    """
    return _strip_rows(logits, logit_tangent, mask)


def certified_radius(
    logits: Tensor, logit_tangent: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Return rung 4, the largest radius that can be proven at low cost.

    The minimum of ``strip_radius``, but without the interval of u around 0 in which one class holds
    more than half of softmax(logits + u a): there can be no zero there. Exact for two classes:
    sqrt((logits_1 - logits_2)^2 + pi^2) / spread.

    Args:
        logits: Numbers that enter the softmax, shape ``[*B, C]``.
        logit_tangent: Their directional derivative, shape ``[*B, C]``.
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool.

    Returns:
        The radius. Shape ``[*B]``, in multiples of the tangent, at least ``strip_radius``.

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Thm 4.3 (two classes).

    Example:
        >>> import torch
        >>> certified_radius(torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([5.0862])
    """
    return _certified_rows(logits, logit_tangent, mask)


def ladder_radius(
    logits: Tensor | Source | None,
    logit_tangent: Tensor,
    *,
    mask: Tensor | None = None,
    limit: float | None = None,
    rung: str = "certified",
    only_smallest: bool = False,
    spread: Tensor | None = None,
) -> Tensor:
    """Return for each row the radius at the rung that decides whether 1 / radius <= limit.

    Rows that the bound leaves undecided go to the closed form, and rows that the closed form leaves
    undecided are scanned; they are gathered, so only they cost time. If the bound decides all rows,
    the tangent is read once and the logits are not read: a NaN among them is not seen, and a class
    with logit -inf counts with its tangent. The only synchronization with the device is the check
    whether any row is undecided.

    Args:
        logits: Numbers that enter the softmax, shape ``[*B, C]``; may be None for rung "bound". Or
            a function that computes them, if they are too large to store: ``logits(rows, classes)``
            with flat row indices (None: all rows) and a slice of the classes.
        logit_tangent: Their directional derivative, shape ``[*B, C]``.
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool; only
            rows if `logits` is a function.
        limit: Largest normalised step (1 / radius) that passes. None takes all rows to ``rung``.
        rung: The highest rung, one of ``RUNGS`` that may be chosen: "bound" or "certified".
        only_smallest: Whether only the smallest radius is needed: a row that a lower rung shows not
            to hold it does not climb.
        spread: ``logit_spread`` of the rows, if already known.

    Returns:
        The radius. Shape ``[*B]``, in multiples of the tangent. Every value is proven. A row over
        the limit has the radius at ``rung``; a row within the limit may have the smaller radius of
        a lower rung. With ``only_smallest``, so may every row except the one with the smallest.

    Raises:
        ValueError: If the limit is not positive, logits are missing, or a mask does not fit them.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0]])
        >>> ladder_radius(logits, torch.tensor([[1.0, 0.0], [6.0, 0.0]]), limit=1.0)
        tensor([3.1416, 0.8477])
    """
    if spread is None:
        spread = logit_spread(logit_tangent, mask=mask)
    if rung not in RUNG_OPTIONS:
        names = " or ".join(map(repr, RUNG_OPTIONS))
        raise ValueError(f"ladder_radius: expected `rung` {names}, got {rung!r}. Choose one.")
    highest = RUNGS[rung]
    if not highest.needs_logits:
        return math.pi / spread
    if logits is None:
        raise ValueError(
            f"ladder_radius: expected `logits` for rung {rung!r}, got None. "
            "Pass them, or ask for rung='bound'."
        )
    if limit is not None and not limit > 0:
        raise ValueError(
            f"ladder_radius: expected `limit` > 0, got {limit}. 1.0 is the radius itself."
        )
    if limit is None and not only_smallest and isinstance(logits, Tensor):
        return highest.of_rows(logits, logit_tangent, mask)
    source = _source_of(logits, logit_tangent, mask, spread.detach())
    bound = math.pi / spread.detach()
    dtype = logits.dtype if isinstance(logits, Tensor) else bound.dtype
    radius = bound.to(torch.promote_types(bound.dtype, dtype)).flatten()
    threshold = math.inf if limit is None else 1 / limit
    if only_smallest:
        _climb_to_smallest(radius, source, threshold, highest.of_rows)
    else:
        _climb_all(radius, source, threshold, highest.of_rows)
    return radius.view(bound.shape)


def _source_of(
    logits: Tensor | Source, logit_tangent: Tensor, mask: Tensor | None, spread: Tensor
) -> HeldRows | ComputedRows:
    """Return the rows of a batch, flattened to one axis.

    Raises:
        ValueError: If shapes do not fit, or computed logits come with a mask of classes.
    """
    classes = logit_tangent.shape[-1]
    of_classes = mask if mask is not None and mask.ndim == logit_tangent.ndim else None
    tangent = logit_tangent.reshape(-1, classes)
    if isinstance(logits, Tensor):
        check_rows("ladder_radius", logit_tangent, mask, logits)
        of_classes = None if of_classes is None else of_classes.reshape(-1, classes)
        return HeldRows(logits.reshape(-1, classes), tangent, of_classes)
    check_rows("ladder_radius", logit_tangent, mask)
    if of_classes is not None:
        raise ValueError(
            "ladder_radius: expected a `mask` of rows with `logits` that are computed, got one of "
            "classes. Give the classes that do not exist the logit -inf."
        )
    return ComputedRows(logits, tangent, spread.flatten())


def _climb_all(
    radius: Tensor,
    source: HeldRows | ComputedRows,
    threshold: float,
    highest: Callable[..., Tensor],
) -> None:
    """Move the rows below the threshold up the ladder, each only as far as needed."""
    for rung in (_closed_form_rows, highest):
        rows = _unsettled(radius, threshold)
        if rows is not None:
            radius[rows] = source.climb(rung, rows)


def _climb_to_smallest(
    radius: Tensor,
    source: HeldRows | ComputedRows,
    threshold: float,
    highest: Callable[..., Tensor],
) -> None:
    """Move up the rows below the threshold that may hold the smallest radius of all."""
    rows, smallest = _unsettled(radius, threshold), threshold
    if rows is None:
        return
    if source.tangent.shape[-1] >= 2 * BINS:
        radius[rows], count = source.coarse(rows), 1
    else:
        # The first few rows give a radius that most other rows provably do not undercut.
        first = radius[rows].nan_to_num(-math.inf).topk(min(_FEW, len(rows)), largest=False)
        first = rows[first.indices].sort().values
        radius[first] = source.climb(highest, first)
        smallest = min(float(radius[first].min()), threshold)
        rows = _unsettled(radius.index_fill(0, first, math.inf), smallest)
        if rows is None:
            return
        radius[rows], count = source.climb(_closed_form_rows, rows), _FEW
    for few in rows[radius[rows].argsort()].split(count):
        if not bool((radius[few] < smallest).any()):
            return
        few = few.sort().values
        radius[few] = source.climb(partial(highest, enough=smallest), few)
        smallest = min(smallest, float(radius[few].min()))


def _unsettled(radius: Tensor, threshold: float) -> Tensor | None:
    # NaN is undecided: it may come from a class that does not exist.
    below = ~(radius >= threshold)
    return below.nonzero().squeeze(-1) if below.any() else None


def _bound_rows(
    logits: Tensor, logit_tangent: Tensor, mask: Tensor | None, enough: float | None = None
) -> Tensor:
    return radius_bound(logit_tangent, mask=mask)


def _closed_form_rows(
    logits: Tensor, logit_tangent: Tensor, mask: Tensor | None, enough: float | None = None
) -> Tensor:
    return climb_rows("closed_form_radius", _closed_form, logits, logit_tangent, mask)


def _strip_rows(
    logits: Tensor, logit_tangent: Tensor, mask: Tensor | None, enough: float | None = None
) -> Tensor:
    return climb_rows("strip_radius", _strip, logits, logit_tangent, mask)


def _certified_rows(
    logits: Tensor, logit_tangent: Tensor, mask: Tensor | None, enough: float | None = None
) -> Tensor:
    # The search in a row stops once its radius is proven to be at least `enough`.
    return climb_rows("certified_radius", _certified, logits, logit_tangent, mask, enough)


def _closed_form(log_weight: Tensor, slope: Tensor) -> Tensor:
    """Return rung 2 in units of 1 / spread."""
    _, log_variance, _ = tilted_moments(log_weight, slope)
    log_kappa = (math.log(0.25) - log_variance).clamp(min=0)
    # Newton solves x + log x = total; the first guess is within 15 % where it is needed.
    total = math.log(math.pi**2 / 2) + log_kappa.clamp(min=math.pi**2 / 2)
    x = total - total.log()
    for _ in range(4):
        x = x * (1 + total - x.log()) / (1 + x)
    near = torch.hypot(log_kappa, torch.full_like(log_kappa, math.pi))
    return torch.where(log_kappa <= math.pi**2 / 2, near, (x * (x + 2)).sqrt())


def _certified(log_weight: Tensor, slope: Tensor, enough: Tensor | None = None) -> Tensor:
    """Return rung 4 in units of 1 / spread."""
    left, right = dominated_interval(log_weight, slope)
    outside = scan_minimum(log_weight, slope, left, right, inside=False, enough=enough)
    return torch.maximum(outside, _closed_form(log_weight, slope))


def _strip(log_weight: Tensor, slope: Tensor) -> Tensor:
    """Return rung 3: scan what rung 4 scans and what it omits, so it never exceeds rung 4."""
    left, right = dominated_interval(log_weight, slope)
    outside = scan_minimum(log_weight, slope, left, right, inside=False)
    inside = scan_minimum(log_weight, slope, left, right, inside=True)
    return torch.maximum(torch.minimum(outside, inside), _closed_form(log_weight, slope))


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of the ladder.

    Attributes:
        of_rows: Returns the radii ``[*B]`` of logits and tangents ``[*B, C]`` under a mask. With
            ``enough``, the search in a row may stop once its radius is proven to be at least that.
        needs_logits: Whether the rung reads the logits.
        is_option: Whether a user may choose it as the radius that limits a step.
    """

    of_rows: Callable[..., Tensor]
    needs_logits: bool = True
    is_option: bool = False


# From the lowest to the highest; `exact_radius` is above them all.
RUNGS = {
    "bound": Rung(_bound_rows, needs_logits=False, is_option=True),
    "closed form": Rung(_closed_form_rows),
    "strip": Rung(_strip_rows),
    "certified": Rung(_certified_rows, is_option=True),
}
RUNG_OPTIONS = tuple(name for name, rung in RUNGS.items() if rung.is_option)
# Type checkers cannot read the options from the entries; a test compares the two.
RungOption = Literal["bound", "certified"]
