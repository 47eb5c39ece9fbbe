"""Weights of the rows of a loss, which only its own backward pass shows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from safestep._torch import forward_mode_enabled, is_batched
from safestep.capture.gradient import GradientEvidence
from safestep.capture.isolation import without_side_effects
from safestep.capture.loss_watch import LossInput
from safestep.capture.losses import loss_function
from safestep.capture.outputs import named_tensors, traced_loss
from safestep.capture.row_losses import UNWEIGHED
from safestep.capture.unwinding import FunctionMode
from safestep.radius.loss_change import RowLoss

if TYPE_CHECKING:
    from safestep.capture.call import Call


class EventGradient(NamedTuple):
    """The gradient of a loss at the result of a loss function.

    Attributes:
        gradient: The gradient, in the shape of the result.
        flags: True where a row has one: shape ``[*B]``, or ``[]`` where all rows share one.
    """

    gradient: Tensor
    flags: Tensor


def weighted_rows(call: Call, events: Collection[int]) -> dict[int, EventGradient]:
    """Run a call again and return which rows of its loss functions have a gradient.

    The result of ``cross_entropy(..., reduction="none")`` may be multiplied by a mask, and so may
    entries of a log_softmax. The autograd graph begins at these results, so the model runs without
    one.

    Args:
        call: The call. It must call the same functions as when the events were counted.
        events: Indices of calls of loss functions, softmaxes and sigmoids.

    Returns:
        By index. An event without a gradient is left out.
    """
    children, _ = call.modes
    root = children[0] if children else torch.nn.Module()
    isolated = without_side_effects(root, call.unused_generators)
    with isolated, torch.no_grad(), forward_mode_enabled(False):
        watch = _Results(events)
        output = call.run(watch)
        roots, seeds = _roots(call, output)
        results = list(watch.results.values())
        if not roots or not results:
            return {}
        found = torch.autograd.grad(roots, results, seeds, allow_unused=True)
    return {
        index: EventGradient(gradient, watch.flags[index](gradient.ne(0)))
        for index, gradient in zip(watch.results, found, strict=True)
        if gradient is not None
    }


def row_losses(
    seen: LossInput,
    weight: EventGradient | None,
    others: Mapping[int, EventGradient] | None,
    gradients: Mapping[str, GradientEvidence],
) -> list[RowLoss | str]:
    """Return weights and labels of the rows of each part of an event.

    Args:
        seen: The event.
        weight: The gradient at its result, if it is known.
        others: The known gradients of all events; None if there is only this one.
        gradients: What the gradients at the outputs of the call show.

    Returns:
        One entry a part.
    """
    losses: list[RowLoss | str] = [UNWEIGHED for _ in seen.parts]
    if weight is not None:
        losses = seen.row_losses(weight.gradient)
    elif others is None and seen.is_reduced:
        losses = seen.row_losses(_outer_gradient(gradients))
    elif others:  # an event without a gradient
        rows = [torch.zeros(source.shape[:-1]) for source, _ in seen.parts]
        losses = [RowLoss(row, row.long()) for row in rows]
    unknown = f"{seen.entry.name} does not tell the rows' weights and labels in the loss"
    return losses or [unknown for _ in seen.parts]


def _outer_gradient(gradients: Mapping[str, GradientEvidence]) -> Tensor | None:
    """Return the gradient at the loss that a model returned, None if the call is the whole step."""
    scalars = [seen.sample for seen in gradients.values() if seen.sample.numel() == 1]
    return scalars[0].reshape(()) if len(scalars) == 1 else None


def _roots(call: Call, output: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors where the backward pass begins, and the gradients there."""
    if not call.gradients:
        roots = [tensor for _, tensor in traced_loss(output)]
        return roots, [torch.ones_like(tensor) for tensor in roots]
    pairs = [
        (tensor, _whole_gradient(call, name))
        for name, tensor in named_tensors(output)
        if tensor.grad_fn is not None
    ]
    known = [(tensor, gradient.to(tensor)) for tensor, gradient in pairs if gradient is not None]
    return [tensor for tensor, _ in known], [gradient for _, gradient in known]


def _whole_gradient(call: Call, name: str) -> Tensor | None:
    """Return the gradient at an output; None if there is none, or it was too large to keep."""
    evidence = call.gradients.get(name)
    if evidence is None or evidence.class_axis is None:
        return None if evidence is None else evidence.sample
    return call.kept.sums.get(name)


class _Results(FunctionMode):
    """Begin the autograd graph at the results of some functions.

    Args:
        events: Indices of their calls, counted as ``LossWatch`` counts.
    """

    def __init__(self, events: Collection[int]) -> None:
        super().__init__()
        self._events = events
        self._count = 0
        self.results: dict[int, Tensor] = {}
        self.flags: dict[int, Callable[[Tensor], Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the result of the function, as a leaf if it is one of the events."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        entry = loss_function(func)
        if entry is None:
            return result
        result, *others = result if isinstance(result, tuple) else (result,)
        index, self._count = self._count, self._count + 1
        if index in self._events and not is_batched(result):
            if not result.requires_grad:  # else it depends on an earlier one
                result = result.detach().requires_grad_()
            torch.set_grad_enabled(True)  # until the end of the call
            self.results[index] = result
            self.flags[index] = lambda flags: entry.row_flags(flags, *args, **kwargs)
            result = result.clone()  # a leaf must not be changed in place
        return (result, *others) if others else result
