"""Record what a training step passes to its loss functions while it runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_tensor

from safestep._torch import DisableTorchFunction, is_batched, tree_map
from safestep.capture import fused_logits as tiles
from safestep.capture.autograd_graph import Node
from safestep.capture.losses import LossFunction, Part, class_axis, loss_function
from safestep.capture.unwinding import FunctionMode
from safestep.capture.vmap import all_examples, held
from safestep.radius.loss_change import RowLoss


def _no_losses(gradient: Tensor | None) -> list[RowLoss | str]:
    return []


@dataclass(frozen=True, slots=True)
class LossInput:
    """One call of a loss function, and the logits it was given.

    Attributes:
        entry: The function.
        parts: The logits, classes last, ``[*B, C]``, or tiles of them, each with a mask: True
            where a row counts, None if all do.
        is_trained: Whether the logits, not only the target, require a gradient.
        prediction: Node of the autograd graph that computed the argument, if there is one.
        result: Node of the result.
        is_reduced: Whether the result is a sum over rows, so that all have the same weight.
        dim: Axis of the classes, of a softmax.
        row_losses: From the gradient at the result, None if it is the same for all rows, to
            weights and labels of the rows of each part; empty where they do not follow.
    """

    entry: LossFunction
    parts: tuple[Part, ...]
    is_trained: bool
    prediction: Node | None
    result: Node | None
    is_reduced: bool
    dim: int | None = None
    row_losses: Callable[[Tensor | None], list[RowLoss | str]] = _no_losses


class LossWatch(FunctionMode):
    """Record the calls of loss functions, softmaxes and sigmoids inside a ``with`` block.

    It surrounds a re-run, never the user's own loop.

    Args:
        keep: Indices of the calls to record, None for all. The scores of an attention, say, need
            not be kept.

    Attributes:
        names: Names of all functions called, in order.
        seen: The recorded calls, by their index.
        dtypes: Floating point types of all results, since a function may cast or enter an
            autocast region of its own.
        cut: Name of a function that passes no tangent on, None if there was none.

    Example:
        >>> logits, target = torch.zeros(2, 3), torch.tensor([0, 2])
        >>> with LossWatch() as watch:
        ...     loss = torch.nn.functional.cross_entropy(logits / 0.5, target)
        >>> watch.names, watch.seen[0].parts[0][0].shape
        (['cross_entropy'], torch.Size([2, 3]))
    """

    def __init__(self, keep: frozenset[int] | None = None) -> None:
        super().__init__()
        self.keep = keep
        self.names: list[str] = []
        self.seen: dict[int, LossInput] = {}
        self.dtypes: set[torch.dtype] = set()
        self.cut: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the result of the function, and record its arguments."""
        kwargs = kwargs or {}
        entry = loss_function(func)
        if entry is None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                with DisableTorchFunction():  # no other mode needs to see these questions
                    if result.is_floating_point():
                        self.dtypes.add(result.dtype)
            return result
        if entry.has_forward_mode:
            result = func(*args, **kwargs)
        else:
            result = func(*tree_map(tiles.primal, args), **tree_map(tiles.primal, kwargs))
            self.cut = entry.name
        if self.keep is None or len(self.names) in self.keep:
            first = result[0] if isinstance(result, tuple) else result
            self.seen[len(self.names)] = _loss_input(entry, first, args, kwargs)
        self.names.append(entry.name)
        return result


def _loss_input(
    entry: LossFunction, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LossInput:
    argument = next(filter(is_tensor, args)) if args else kwargs[entry.argument]
    return LossInput(
        entry,
        tuple(_with_rows(_of_all_examples(part)) for part in entry.reader(*args, **kwargs)),
        is_trained=held(result if entry.is_fused else argument).requires_grad,
        prediction=held(argument).grad_fn,
        result=held(result).grad_fn,
        is_reduced=is_batched(result) or (entry.is_loss and result.ndim == 0),
        dim=class_axis(*args, **kwargs) if "softmax" in entry.kind else None,
        row_losses=_no_losses
        if is_batched(result)
        else lambda gradient: list(map(_of_rows, entry.row_losses(gradient, *args, **kwargs))),
    )


def _of_rows(loss: RowLoss | str) -> RowLoss | str:
    """Return the loss with an axis of rows, also where it is a single row."""
    if isinstance(loss, str) or loss.weight.ndim:
        return loss
    return RowLoss(loss.weight.reshape(1), loss.labels.unsqueeze(0), loss.smoothing)


def _with_rows(part: Part) -> Part:
    """Return the part with an axis of rows, also where it is a single row."""
    logits, mask = part
    if isinstance(logits, tiles.LinearTile) or logits.ndim > 1:
        return part
    return logits.unsqueeze(0), None if mask is None else mask.reshape(1)


def _of_all_examples(part: Part) -> Part:
    logits, mask = part
    if isinstance(logits, tiles.LinearTile) or not is_batched(logits):
        return part
    if mask is not None:  # labels may be shared by examples
        mask = all_examples(mask & torch.ones_like(logits[..., 0], dtype=torch.bool))
    return all_examples(logits), mask
