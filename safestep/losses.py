"""Layer 1: see what a training step hands to its loss functions while it runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class LossInput:
    """Logits that a function of a loss was given.

    Attributes:
        function: Name of the function.
        logits: The logits, classes last. Shape ``[*B, C]``.
        mask: True where a row counts, None if all do. Shape ``[*B]``.
        is_loss: Whether the function is a loss; a softmax may also be a part of the model.
    """

    function: str
    logits: Tensor
    mask: Tensor | None
    is_loss: bool


class LossWatch(TorchFunctionMode):
    """Collect the input of every loss function, softmax and sigmoid that is called inside.

    Only around a re-run, never around the user's own loop.

    Attributes:
        seen: What was collected, in the order of the calls.

    Example:
        >>> logits, target = torch.zeros(2, 3), torch.tensor([0, 2])
        >>> with LossWatch() as watch:
        ...     loss = torch.nn.functional.cross_entropy(logits / 0.5, target)
        >>> watch.seen[0].function, watch.seen[0].logits.shape
        ('cross_entropy', torch.Size([2, 3]))
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[LossInput] = []

    def __enter__(self) -> LossWatch:
        super().__enter__()
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return what the function returns, after a look at what it was given."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _LOSSES:
            self.seen.append(LossInput(name, *_LOSSES[name](*args, **kwargs), is_loss=True))
        elif name in _SOFTMAXES:
            self.seen.append(LossInput(name, _SOFTMAXES[name](*args, **kwargs), None, False))
        return result


def binary_rows(logit: Tensor) -> Tensor:
    """Return sigmoid logits as rows of two classes.

    Args:
        logit: Numbers that enter a sigmoid. Shape ``[*B]``.

    Returns:
        The rows (0, logit), whose softmax is (1 - sigmoid, sigmoid). Shape ``[*B, 2]``.

    Example:
        >>> binary_rows(torch.tensor([3.0]))
        tensor([[0., 3.]])
    """
    return torch.stack((torch.zeros_like(logit), logit), dim=-1)


# The readers below are called like the torch functions they are named after, so their arguments
# have torch's names. Each returns the logits and the rows that count.


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: int = -100,
    reduce: object = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    axis = 1 if input.ndim > 1 else 0
    logits = input.movedim(axis, -1)
    if target.is_floating_point():
        if label_smoothing > 0:
            return logits, None
        target = target.movedim(axis, -1)
        return logits, (target if weight is None else target * weight).ne(0).any(-1)
    mask = target != ignore_index
    if weight is not None and label_smoothing == 0:
        mask = mask & weight[target.clamp(0, len(weight) - 1)].ne(0)
    return logits, mask


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    mask = None if weight is None else weight.ne(0).expand_as(input)
    if pos_weight is not None:
        mask = (pos_weight.ne(0) | target.ne(1)) & (True if mask is None else mask)
    return binary_rows(input), mask


def _binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *_: object, **__: object
) -> tuple[Tensor, Tensor | None]:
    mask = None if weight is None else weight.ne(0).expand_as(input)
    return binary_rows(input.logit()), mask


def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> tuple[Tensor, Tensor | None]:
    return input, None if log_target else target.ne(0).any(-1).expand(input.shape[:-1])


def _softmax(
    input: Tensor, dim: int | tuple[int, ...] | None = None, *_: object, **__: object
) -> Tensor:
    if dim is None:  # what torch takes where no dim is given, with a warning of its own
        dim = 0 if input.ndim in (0, 1, 3) else 1
    if isinstance(dim, int):
        return input.movedim(dim, -1)
    return input.movedim(dim, tuple(range(-len(dim), 0))).flatten(-len(dim))


def _sigmoid(input: Tensor, *_: object, **__: object) -> Tensor:
    return binary_rows(input)


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return binary_rows(beta * input)


_LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "cross_entropy": _cross_entropy,
    # Log-probabilities are the logits up to a shift of each row, which changes no spread.
    "nll_loss": _cross_entropy,
    "binary_cross_entropy_with_logits": _binary_cross_entropy_with_logits,
    "binary_cross_entropy": _binary_cross_entropy,
    "kl_div": _kl_div,
}
_SOFTMAXES: dict[str, Callable[..., Tensor]] = {
    "log_softmax": _softmax,
    "special_log_softmax": _softmax,
    "softmax": _softmax,
    "special_softmax": _softmax,
    "logsumexp": _softmax,
    "special_logsumexp": _softmax,
    "log_sigmoid": _sigmoid,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
}
