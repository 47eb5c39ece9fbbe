"""Logits that were found, and their description for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from safestep.capture.fused_logits import LinearTile
from safestep.capture.row_losses import UNWEIGHED
from safestep.radius.loss_change import RowLoss


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits that enter one softmax.

    Attributes:
        name: Where they were found, in words for the user.
        source: The logits, classes last, ``[*B, C]``, or a tile that computes them.
        mask: True where a row counts, None if all do. Shape ``[*B]``.
        loss: Weights and labels of the rows in the loss, or why they are not known.
    """

    name: str
    source: Tensor | LinearTile
    mask: Tensor | None = None
    loss: RowLoss | str = UNWEIGHED

    @property
    def values(self) -> Tensor:
        """The logits, ``[*B, C]``; computed at each access if they are too large to store."""
        source = self.source
        return source if isinstance(source, Tensor) else source().view(source.shape)


def describe(found: Sequence[Logits]) -> str:
    """Return one line that says which logits were found.

    Args:
        found: The logits.

    Returns:
        For instance ``"logits: input of cross_entropy, [512, 5000], 3 % of rows ignored"``.

    Example:
        >>> import torch
        >>> describe([Logits("output", torch.zeros(4, 3), torch.tensor([1, 1, 1, 0]).bool())])
        'logits: output, [4, 3], 25 % of rows ignored'
    """
    heads: dict[str, list[Logits]] = {}
    for item in found:
        heads.setdefault(item.name, []).append(item)
    return "logits: " + "; ".join(_describe_head(name, items) for name, items in heads.items())


def _describe_head(name: str, items: Sequence[Logits]) -> str:
    first, *rest = (item.source.shape for item in items)
    shape = [first[0] + sum(other[0] for other in rest), *first[1:]] if rest else list(first)
    masks = [item.mask for item in items if item.mask is not None]
    counted = sum(int(mask.sum()) for mask in masks)
    total = sum(mask.numel() for mask in masks)
    if counted == total:
        return f"{name}, {shape}"
    return f"{name}, {shape}, {100 * (1 - counted / total):.2g} % of rows ignored"
