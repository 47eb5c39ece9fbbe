"""Read the arguments of functions that compute the logits themselves and never hold them all."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd import forward_ad

from safestep.capture import fused_logits as tiles

# Logits, or tiles of them, and the mask of the rows that count; None: all do.
Part = tuple[Tensor | tiles.LinearTile, Tensor | None]


def labelled(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
) -> Tensor | None:
    """Return a mask of the rows whose label counts, None if all do.

    Args:
        target: Labels, or shares of the classes, classes last.
        weight: Weights of the classes, if they have some.
        ignore_index: The label that does not count.
        label_smoothing: The share that goes to all classes alike.

    Returns:
        True for rows that count.
    """
    if target.is_floating_point():
        if label_smoothing > 0:
            return None
        return (target if weight is None else target * weight).ne(0).any(-1)
    mask = target != (-100 if ignore_index is None else ignore_index)
    if weight is not None and label_smoothing == 0:
        mask = mask & weight[target.clamp(0, len(weight) - 1)].ne(0)
    return mask


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
) -> Iterator[Part]:
    """Read torch's function of this name: tiles of logits, and the rows that count.

    Returns:
        Tiles, each with the mask of its rows.
    """
    classes, *positions, features = linear_weight.shape
    rows = input.reshape(-1, features)
    matrix = _held(linear_weight).reshape(-1, features)
    bias = None if linear_bias is None else _held(linear_bias).flatten()
    if target.is_floating_point() and target.ndim > 1:
        target = target.movedim(1, -1)
    mask = labelled(target, weight, ignore_index, label_smoothing)
    mask = None if mask is None else mask.reshape(len(rows), *positions)
    return _tiles(rows, matrix, bias, (classes, *positions), mask)


def _tiles(
    rows: Tensor, matrix: Tensor, bias: Tensor | None, layout: tuple[int, ...], mask: Tensor | None
) -> Iterator[Part]:
    for part in tiles.row_slices(len(rows), len(matrix)):
        tile = tiles.LinearTile(rows[part], matrix, bias, layout)
        yield tile, None if mask is None else mask[part]


def tiled_logits(
    rows: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Iterator[Part]:
    """Return the logits of a last linear layer, in tiles.

    Args:
        rows: Inputs of the layer. Shape ``[B, F]``.
        weight: Its weight. Shape ``[C, F]``.
        bias: Its bias, ``[C]``, if it has one.
        mask: True for rows that count, ``[B]``; None if all do.

    Returns:
        Tiles, each with the mask of its rows.
    """
    bias = None if bias is None else _held(bias)
    return _tiles(rows, _held(weight), bias, (len(weight),), mask)


def chunked_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    *_: object,
) -> Iterator[Part]:
    """Read the arguments of TRL's log-probabilities of targets, which never form the logits.

    Returns:
        Tiles of the logits; all rows count.

    Raises:
        RuntimeError: If the logits are capped, which no tile of them shows.
    """
    if final_logit_softcapping is not None:
        raise RuntimeError(
            "the logits are capped inside a fused function, out of reach; set "
            "`final_logit_softcapping` to None in the model's config, or use the loss that forms "
            "the logits"
        )
    scale = logit_scale / temperature
    bias = None if bias is None else _held(bias) * scale
    return _tiles(hidden * scale, _held(weight), bias, (len(weight),), None)


def _held(parameter: Tensor) -> Tensor:
    """Return a parameter as it is now, for a product that is computed later."""
    # A dual one cannot outlive its run; another may be moved before the product is.
    is_dual = forward_ad.unpack_dual(parameter).tangent is not None
    return parameter if is_dual else parameter.detach().clone()
