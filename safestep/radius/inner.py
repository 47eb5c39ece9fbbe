"""Radii inside a model: of the attention softmax and of activation units that switch at zero."""

import math

import torch
from torch import Tensor

from safestep.radius.bounds import radius_bound

KINK_QUANTILE = 0.01  # Ghosts of Softmax, Sec. 6.6


def attention_radius(score_tangent: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the smallest convergence radius of the softmax over attention scores.

    radius = pi / max over queries of (max_k d_k - min_k d_k), where d is the tangent of the scores
    that enter the softmax: scaled, with biases added.

    Args:
        score_tangent: Directional derivative of the scores. Shape ``[*B, Q, K]``, keys last. Unit:
            scores (proposed update) or scores per parameter distance (unit tangent).
        mask: True where a query may attend to a key, bool. Shape ``[*B, Q, K]``.

    Returns:
        A scalar in multiples of the tangent, infinite if no attention changes along it.

    Raises:
        ValueError: If there is no key, or the mask has another shape.
        TypeError: If the mask is not bool.

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Sec. 6.6.

    Example:
        >>> attention_radius(torch.tensor([[0.5, -1.5, 0.0], [0.0, 0.1, 0.0]]))
        tensor(1.5708)
    """
    return radius_bound(score_tangent, mask=mask).amin()


def kink_radius(pre_activation: Tensor, tangent: Tensor, quantile: float = KINK_QUANTILE) -> Tensor:
    """Return the distance along the tangent at which the first activation units switch.

    A unit h(t) = h + t dh crosses zero at the distance |h| / |dh|, in one direction or the other;
    the radius is a low quantile of these distances. ReLU has a kink there. GELU and SiLU are
    smooth: for them it is the distance at which units switch, not that of a singularity.

    Args:
        pre_activation: Input h of the activation function. Any shape.
        tangent: Its directional derivative dh, of the same shape.
        quantile: Share of the units that switch within the radius. The result is the distance of
            one unit, not an interpolation.

    Returns:
        A scalar in multiples of the tangent: infinite if fewer units than that share move, NaN if
        an input is not finite.

    Raises:
        ValueError: If the shapes differ or are empty, or `quantile` is not within [0, 1].

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Sec. 6.6.

    Example:
        >>> kink_radius(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1.0, 0.5, 0.0]), 0.0)
        tensor(2.)
    """
    if pre_activation.shape != tangent.shape or pre_activation.numel() == 0:
        raise ValueError(
            "kink_radius: expected `tangent` in the shape of `pre_activation`, not empty, got "
            f"{tuple(tangent.shape)} and {tuple(pre_activation.shape)}. Give a number for each."
        )
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(
            f"kink_radius: expected `quantile` in [0, 1], got {quantile!r}. 0.01 is the paper's."
        )
    wide = torch.promote_types(pre_activation.dtype, torch.float32)
    h, dh = (each.detach().flatten().to(wide) for each in (pre_activation, tangent))
    distance = torch.where(dh == 0, math.inf, (h / dh).abs())
    rank = 1 + math.floor(quantile * (len(distance) - 1))
    is_finite = h.isfinite().all() & dh.isfinite().all()
    return torch.where(is_finite, distance.kthvalue(rank).values, math.nan)
