"""KL divergence between predictions before and after an update, for linearised logits."""

import math

import torch
from torch import Tensor

from safestep.radius.rows import CHUNK_ELEMENTS, check_rows

_SMALL = 0.1  # below it, exp(b) - 1 - b cancels and is computed by its series


def linearized_divergence(
    logits: Tensor, logit_tangent: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Return the divergence of the predictions from those after the whole update.

    divergence = KL(P || softmax(z + a)) = log sum_k P_k exp(a_k) - sum_k P_k a_k, P = softmax(z).
    With linearised logits and labels that sum to 1, the cross-entropy of a row changes by its slope
    along the update plus this divergence, which does not depend on the labels.

    Args:
        logits: Numbers that enter the softmax. Shape ``[*B, C]``.
        logit_tangent: Their directional derivative along the whole update. Shape ``[*B, C]``, unit:
            logits.
        mask: Rows that count ``[*B]`` or classes that exist ``[*B, C]``, bool.

    Returns:
        The divergence, in nats, at most spread^2 / 8. Shape ``[*B]``, never negative; 0 for a row
        that is masked or has fewer than two classes. NaN where a logit or tangent of a class that
        exists is NaN, a logit is +inf or a tangent is infinite.

    Raises:
        ValueError: If there is no class, or two shapes do not fit.
        TypeError: If the mask is not bool.

    Reference:
        Hoeffding's lemma for the bound. The identity: subtract and add sum_k P_k a_k in the change
        of log sum_k exp(z_k).

    Example:
        >>> import torch
        >>> linearized_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]]))
        tensor([0.4338])
    """
    check_rows("linearized_divergence", logit_tangent, mask, logits)
    classes = logits.shape[-1]
    exists = logits != -math.inf
    if mask is not None:
        exists = exists & (mask if mask.ndim == logits.ndim else mask.unsqueeze(-1))
    dtype = torch.promote_types(
        torch.promote_types(logits.dtype, logit_tangent.dtype), torch.float32
    )
    size = max(1, CHUNK_ELEMENTS // classes)
    parts = (each.reshape(-1, classes).split(size) for each in (logits, logit_tangent, exists))
    rows = [_of_rows(z.to(dtype), a.to(dtype), e) for z, a, e in zip(*parts, strict=True)]
    return torch.cat(rows).reshape(logits.shape[:-1])


def _of_rows(logits: Tensor, tangent: Tensor, exists: Tensor) -> Tensor:
    is_broken = (exists & ~((logits < math.inf) & tangent.isfinite())).any(dim=-1)
    is_live = exists.any(dim=-1) & ~is_broken
    # A row without classes gets equal logits and a zero tangent.
    logits = logits.masked_fill(~exists, -math.inf).masked_fill(~is_live.unsqueeze(-1), 0.0)
    tangent = tangent.masked_fill(~exists | ~is_live.unsqueeze(-1), 0.0)
    log_share = logits.log_softmax(dim=-1)
    share = log_share.exp()
    offset = tangent - (share * tangent).sum(dim=-1, keepdim=True)
    offset = offset.masked_fill(share == 0, 0.0)  # exp(offset) could overflow at share 0
    near = (share * _curved(offset)).sum(dim=-1).log1p()
    far = (log_share + offset).logsumexp(dim=-1)
    divergence = torch.where(offset.abs().amax(dim=-1) < 1.0, near, far).clamp(min=0.0)
    return divergence.masked_fill(is_broken, math.nan)


def _curved(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x, by its series near 0, where the difference cancels."""
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return torch.where(x.abs() < _SMALL, series, torch.expm1(x) - x)
