"""Code that all rungs share: checks, the spread, and rows scaled to units of their spread."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from safestep.radius.masking import filled_in

# Maps log-weights [N, C] (-inf: absent class) and slopes [N, C] in [0, 1] to radii [N]. An optional
# third argument [N] is the radius at which the search in a row may stop.
Rung = Callable[..., Tensor]

# Elements of one [rows, classes] work array: 16 MiB in float32.
CHUNK_ELEMENTS = 1 << 22


def check_rows(
    where: str, logit_tangent: Tensor, mask: Tensor | None, logits: Tensor | None = None
) -> None:
    """Check that the arguments are a batch of rows.

    Raises:
        ValueError: If there is no class, or two shapes do not fit.
        TypeError: If the mask is not bool.
    """
    shape = tuple(logit_tangent.shape)
    if not shape or shape[-1] == 0:
        raise ValueError(
            f"{where}: expected `logit_tangent` with classes on the last axis, got shape {shape}. "
            "Move them there: tensor.movedim(axis, -1)."
        )
    if logits is not None and logits.shape != logit_tangent.shape:
        raise ValueError(
            f"{where}: expected `logits` of the shape of `logit_tangent`, {shape}, "
            f"got {tuple(logits.shape)}. Give each logit its tangent."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"{where}: expected `mask` of dtype bool, got {mask.dtype}. Pass mask.bool()."
        )
    if mask is not None and mask.shape not in {shape, shape[:-1]}:
        raise ValueError(
            f"{where}: expected `mask` of shape {shape[:-1]} (rows) or {shape} (classes), "
            f"got {tuple(mask.shape)}. Give True for each that counts."
        )


def row_spread(logit_tangent: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``logit_spread`` without its checks."""
    if mask is not None and mask.ndim == logit_tangent.ndim:
        logit_tangent = filled_in(logit_tangent, mask)  # the range stays the same
        mask = mask.any(dim=-1)
    _, spread = _range(logit_tangent)
    return spread if mask is None else torch.where(mask, spread, 0.0)


def _range(logit_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest tangent of each row and the spread, NaN if it is not finite."""
    # Not aminmax, which takes twelve times as long on a CPU.
    lowest, highest = logit_tangent.amin(dim=-1), logit_tangent.amax(dim=-1)
    dtype = torch.promote_types(logit_tangent.dtype, torch.float32)
    spread = highest.to(dtype) - lowest.to(dtype)
    return lowest, torch.where(spread.isinf(), math.nan, spread)


@torch.no_grad()
def climb_rows(
    where: str,
    rung: Rung,
    logits: Tensor,
    logit_tangent: Tensor,
    mask: Tensor | None,
    enough: float | None = None,
    *,
    is_raw: bool = False,
) -> Tensor:
    """Return the larger of the bound and the rung, computed in chunks of rows.

    A raw rung takes logits, tangents, lowest tangents ``[N]`` and spreads ``[N]``.
    """
    check_rows(where, logit_tangent, mask, logits)
    classes = logits.shape[-1]
    if mask is not None and mask.ndim < logits.ndim:
        mask = mask.unsqueeze(-1).expand(logits.shape)
    dtype = torch.promote_types(
        torch.promote_types(logits.dtype, logit_tangent.dtype), torch.float32
    )
    size = max(1, CHUNK_ELEMENTS // classes)
    z, a = (each.reshape(-1, classes).split(size) for each in (logits, logit_tangent))
    masks = [None] * len(z) if mask is None else mask.reshape(-1, classes).split(size)
    radius = [
        _climb_chunk(rung, each.to(dtype), tangent.to(dtype), exists, enough, is_raw)
        for each, tangent, exists in zip(z, a, masks, strict=True)
    ]
    return torch.cat(radius).reshape(logits.shape[:-1])


def _climb_chunk(
    rung: Rung,
    logits: Tensor,
    logit_tangent: Tensor,
    exists: Tensor | None,
    enough: float | None,
    is_raw: bool,
) -> Tensor:
    """Return the larger of the bound and the rung; the rung gets only rows of finite radius."""
    highest = logits.amax(dim=-1)
    if exists is not None or not ((logits.amin(dim=-1) > -math.inf) & (highest < math.inf)).all():
        is_class = logits != -math.inf
        exists = is_class if exists is None else exists & is_class
        broken = (exists & ~(logits < math.inf)).any(dim=-1)
        logits = logits.masked_fill(~exists, -math.inf)
        logit_tangent = filled_in(logit_tangent, exists)
        lowest, spread = _range(logit_tangent)
        spread = torch.where(exists.any(dim=-1), spread, 0.0).masked_fill(broken, math.nan)
        highest = logits.amax(dim=-1)
    else:
        lowest, spread = _range(logit_tangent)
    radius = math.pi / spread
    is_live = radius.isfinite()
    if not is_live.any():
        return radius
    if not is_live.all():
        logits, logit_tangent, spread, highest, lowest = (
            each[is_live] for each in (logits, logit_tangent, spread, highest, lowest)
        )
    if is_raw:
        climbed = rung(logits, logit_tangent, lowest, spread)
    else:
        slope = (logit_tangent - lowest.unsqueeze(-1)).div_(spread.unsqueeze(-1))
        aim = () if enough is None else (enough * spread,)
        climbed = rung(logits - highest.unsqueeze(-1), slope, *aim)
    radius[is_live] = torch.maximum(radius[is_live], climbed / spread)
    return radius
