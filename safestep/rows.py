"""Layer 0: what the rungs share: checks, the spread, and rows brought to units of their spread."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# From log-weights [N, C] (-inf: no such class), slopes [N, C] in [0, 1] and, where not every row
# has to be known, the radius [N] that is enough, to radii [N].
Rung = Callable[..., Tensor]

# Elements of one [rows, classes] work array: bounds memory to some 16 MiB apiece in float32.
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
            f"{where}: expected `logit_tangent` with classes on the last axis, got shape {shape}."
        )
    if logits is not None and logits.shape != logit_tangent.shape:
        raise ValueError(
            f"{where}: expected `logits` of the shape of `logit_tangent`, {shape}, "
            f"got {tuple(logits.shape)}."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{where}: expected `mask` of dtype bool, got {mask.dtype}.")
    if mask is not None and mask.shape not in {shape, shape[:-1]}:
        raise ValueError(
            f"{where}: expected `mask` of shape {shape[:-1]} (rows) or {shape} (classes), "
            f"got {tuple(mask.shape)}."
        )


def row_spread(logit_tangent: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``logit_spread`` without its checks."""
    if mask is not None and mask.ndim == logit_tangent.ndim:
        # One class that exists stands in for those that do not: the range stays the same.
        stand_in = logit_tangent.gather(-1, mask.byte().argmax(dim=-1, keepdim=True))
        logit_tangent = torch.where(mask, logit_tangent, stand_in)
        mask = mask.any(dim=-1)
    lowest, highest = logit_tangent.aminmax(dim=-1)
    dtype = torch.promote_types(logit_tangent.dtype, torch.float32)
    spread = highest.to(dtype) - lowest.to(dtype)
    spread = torch.where(spread.isinf(), math.nan, spread)
    return spread if mask is None else torch.where(mask, spread, 0.0)


@torch.no_grad()
def climb_rows(
    where: str,
    rung: Rung,
    logits: Tensor,
    logit_tangent: Tensor,
    mask: Tensor | None,
    enough: float | None = None,
) -> Tensor:
    """Return the larger of bound and rung, computed in chunks of rows."""
    check_rows(where, logit_tangent, mask, logits)
    classes = logits.shape[-1]
    exists = logits != -math.inf
    if mask is not None:
        exists &= mask if mask.ndim == logits.ndim else mask.unsqueeze(-1)
    dtype = torch.promote_types(
        torch.promote_types(logits.dtype, logit_tangent.dtype), torch.float32
    )
    flat = (each.reshape(-1, classes) for each in (logits, logit_tangent, exists))
    chunks = zip(*(each.split(max(1, CHUNK_ELEMENTS // classes)) for each in flat), strict=True)
    radius = [_climb_chunk(rung, z.to(dtype), a.to(dtype), live, enough) for z, a, live in chunks]
    return torch.cat(radius).reshape(logits.shape[:-1])


def _climb_chunk(
    rung: Rung, logits: Tensor, logit_tangent: Tensor, exists: Tensor, enough: float | None
) -> Tensor:
    """Return the larger of bound and rung, which sees rows of spread 1 only."""
    spread = row_spread(logit_tangent, exists)
    broken = (exists & ~(logits < math.inf)).any(dim=-1)
    radius = torch.where(broken, math.nan, math.pi / spread)
    rows = radius.isfinite().nonzero().squeeze(-1)
    if len(rows) > 0:
        absent = ~exists[rows]
        log_weight = logits[rows].masked_fill(absent, -math.inf)
        log_weight = log_weight - log_weight.amax(dim=-1, keepdim=True)
        lowest = logit_tangent[rows].masked_fill(absent, math.inf).amin(dim=-1, keepdim=True)
        slope = (logit_tangent[rows] - lowest) / spread[rows].unsqueeze(-1)
        aim = () if enough is None else (enough * spread[rows],)
        climbed = rung(log_weight, slope.masked_fill(absent, 0.0), *aim) / spread[rows]
        radius[rows] = torch.maximum(radius[rows], climbed)
    return radius
