"""The torch functions that losses are made of, and where each holds logits.

To add a function, write a reader and add a ``LossFunction`` to `LOSS_FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from safestep.capture import row_losses as weights
from safestep.capture.fused_readers import Part, chunked_logprob, labelled, linear_cross_entropy
from safestep.capture.output_weights import of_log_probabilities
from safestep.radius.loss_change import RowLoss


def _unchanged(flags: Tensor, *_: object, **__: object) -> Tensor:
    return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFunction:
    """A torch function that a loss is made of.

    Attributes:
        name: The function's ``__name__``, without the ``special_`` of torch.special; of a
            ``torch.autograd.Function`` the name of its class, with that of the module.
        reader: Called like the function; yields logits, classes last, ``[*B, C]``, or tiles of
            them, each with a mask: True where a row counts, None if all do.
        example: A loss of logits ``[6, 4]`` and labels ``[6]`` that calls the function; None where
            the function is another package's.
        kind: "loss"; "softmax" and "log-softmax", whose result has the shape of the logits; "sum"
            for log-sum-exps; "sigmoid".
        argument: Name of the argument that is computed from the logits.
        is_fused: Whether the function computes the logits itself, from weights it is given.
        is_last_word: Whether its argument always holds logits, so that a softmax before it is part
            of the model.
        outranks_softmax: Whether the mask of this loss is used, rather than that of the softmax
            that its argument came from. "same shape": if both have their classes last.
        combines: Whether it sums over combinations of classes, one from each of many rows.
        has_forward_mode: False where torch has no forward-mode derivative, or one that would hold
            every logit.
        rows: From flags of elements of the result, and the arguments, to flags of rows of logits:
            shape ``[*B]``, or ``[]`` where the result is one number.
        row_reader: From the gradient at the result, or None, and the arguments, to weights and
            labels of the rows of each part that `reader` yields; None where they do not follow.
    """

    name: str
    reader: Callable[..., Iterator[Part]]
    example: Callable[[Tensor, Tensor], Tensor] | None
    kind: Literal["loss", "softmax", "log-softmax", "sum", "sigmoid"] = "loss"
    argument: str = "input"
    is_fused: bool = False
    is_last_word: bool = False
    outranks_softmax: Literal["always", "same shape", "never"] = "never"
    combines: bool = False
    has_forward_mode: bool = True
    rows: Callable[..., Tensor] = _unchanged
    row_reader: weights.RowLossReader | None = None

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss; a softmax or a sigmoid may be part of the model."""
        return self.kind == "loss"

    def row_flags(self, flags: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return which rows of the logits some elements of the result belong to.

        Args:
            flags: True for elements of the result.
            *args: What the function was called with.
            **kwargs: Likewise.

        Returns:
            True for rows. Shape ``[*B]``, or ``[]`` where the result is one number.
        """
        return self.rows(flags, *args, **kwargs) if flags.ndim else flags

    def row_losses(self, gradient: Tensor | None, *args: Any, **kwargs: Any) -> list[RowLoss | str]:
        """Return weights and labels of the rows of each part, or why they are not known.

        Args:
            gradient: The gradient of the loss at the result; None: the same for all rows.
            *args: What the function was called with.
            **kwargs: Likewise.

        Returns:
            One entry a part; empty where the function says nothing about them.
        """
        return [] if self.row_reader is None else list(self.row_reader(gradient, *args, **kwargs))


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


# A reader is called like the torch function it is named after, so its arguments have torch's names.
# It yields logits and the mask of the rows that count.


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: int = -100,
    reduce: object = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Iterator[Part]:
    axis = 1 if input.ndim > 1 else 0
    logits = input.movedim(axis, -1)
    if target.is_floating_point():
        target = target.movedim(axis, -1)
    yield logits, labelled(target, weight, ignore_index, label_smoothing)


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Iterator[Part]:
    mask = None if weight is None else weight.ne(0).expand_as(input)
    if pos_weight is not None:
        mask = (pos_weight.ne(0) | target.ne(1)) & (True if mask is None else mask)
    yield binary_rows(input), mask


def _binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *_: object,
    **__: object,
) -> Iterator[Part]:
    mask = None if weight is None else weight.ne(0).expand_as(input)
    yield binary_rows(input.logit()), mask


def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Iterator[Part]:
    yield input, None if log_target else target.ne(0).any(-1).expand(input.shape[:-1])


def _ctc_loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Any, *_: object, **__: object
) -> Iterator[Part]:
    lengths = torch.as_tensor(input_lengths, device=log_probs.device)
    if log_probs.ndim == 2:
        lengths = lengths.reshape(())
    times = torch.arange(len(log_probs), device=log_probs.device)
    yield log_probs, times.view(-1, *(1 for _ in lengths.shape)) < lengths


def _softmax(input: Tensor, *args: Any, **kwargs: Any) -> Iterator[Part]:
    yield classes_last(input, *args, **kwargs), None


def classes_last(
    input: Tensor, dim: int | tuple[int, ...] | None = None, *_: object, **__: object
) -> Tensor:
    """Return the argument of a softmax with its axis, or all its axes in one, last."""
    dim = class_axis(input) if dim is None else dim
    axes = (dim,) if isinstance(dim, int) else dim
    return input.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))


def class_axis(input: Tensor, dim: int | None = None, *_: object, **__: object) -> int:
    """Return the axis of a softmax."""
    if dim is None:  # torch's own choice, with a warning
        return 0 if input.ndim in (0, 1, 3) else 1
    return dim


def _sigmoid(input: Tensor, *_: object, **__: object) -> Iterator[Part]:
    yield binary_rows(input), None


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Iterator[Part]:
    yield binary_rows(beta * input), None


def _rows_of_softmax(flags: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs = {key: value for key, value in kwargs.items() if key != "input"}
    return classes_last(flags, *args[1:], **kwargs).any(-1)


def _rows_of_sum(flags: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return flags.reshape(classes_last(*args, **kwargs).shape[:-1])


def _rows_of_divergence(flags: Tensor, *_: object, **__: object) -> Tensor:
    return flags.any(-1)


def _of_log_softmax(gradient: Tensor | None, *args: Any, **kwargs: Any) -> Iterator[RowLoss | str]:
    """Read the gradient at log-probabilities, -w y."""
    if gradient is None:
        yield weights.UNWEIGHED
        return
    kwargs = {key: value for key, value in kwargs.items() if key != "input"}
    yield of_log_probabilities(classes_last(gradient, *args[1:], **kwargs))


def _of_log_sigmoid(gradient: Tensor | None, *_: object, **__: object) -> Iterator[RowLoss | str]:
    """Read the gradient at the log-probability of label 1, -w."""
    if gradient is None:
        yield weights.UNWEIGHED
        return
    yield RowLoss(-gradient, torch.ones_like(gradient, dtype=torch.long))


def _of_softplus(
    gradient: Tensor | None, input: Tensor, beta: float = 1.0, *_: object, **__: object
) -> Iterator[RowLoss | str]:
    """Read the gradient at minus the log-probability of label 0, divided by beta."""
    if gradient is None:
        yield weights.UNWEIGHED
        return
    yield RowLoss(gradient / beta, torch.zeros_like(gradient, dtype=torch.long))


def _picked(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, labels.unsqueeze(-1)).mean()


def _one_hot(z: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, z.shape[-1]).to(z)


_LOSSES = (
    LossFunction(
        name="cross_entropy",
        reader=_cross_entropy,
        example=lambda z, y: functional.cross_entropy(z, y),
        is_last_word=True,
        row_reader=weights.of_cross_entropy,
    ),
    LossFunction(
        name="linear_cross_entropy",
        reader=linear_cross_entropy,
        example=lambda z, y: functional.linear_cross_entropy(z, torch.eye(4).to(z), y),
        is_fused=True,
        has_forward_mode=False,
        row_reader=weights.of_linear_cross_entropy,
    ),
    LossFunction(
        name="trl.kernels.chunked_logprob.ChunkedLogProbFunction",
        reader=chunked_logprob,
        example=None,
        is_fused=True,
        has_forward_mode=False,
        row_reader=weights.of_chunked_logprob,
    ),
    LossFunction(
        # Log-probabilities are logits up to a shift of each row, which changes no spread.
        name="nll_loss",
        reader=_cross_entropy,
        example=lambda z, y: functional.nll_loss(z.log_softmax(-1), y),
        outranks_softmax="always",
        row_reader=weights.of_cross_entropy,
    ),
    LossFunction(
        name="binary_cross_entropy_with_logits",
        reader=_binary_cross_entropy_with_logits,
        example=lambda z, y: functional.binary_cross_entropy_with_logits(z, _one_hot(z, y)),
        is_last_word=True,
        row_reader=weights.of_binary_cross_entropy_with_logits,
    ),
    LossFunction(
        # Its argument is rounded by the sigmoid, so the sigmoid's own argument is preferred.
        name="binary_cross_entropy",
        reader=_binary_cross_entropy,
        example=lambda z, y: functional.binary_cross_entropy(z.sigmoid(), _one_hot(z, y)),
    ),
    LossFunction(
        # It does not know which axis holds the classes: the softmax before it does.
        name="kl_div",
        reader=_kl_div,
        example=lambda z, y: functional.kl_div(z.log_softmax(-1), _one_hot(z, y), reduction="sum"),
        outranks_softmax="same shape",
        rows=_rows_of_divergence,
        row_reader=weights.of_kl_div,
    ),
    LossFunction(
        name="ctc_loss",
        reader=_ctc_loss,
        example=lambda z, y: functional.ctc_loss(
            z.log_softmax(-1), y[:1] % 3 + 1, torch.tensor(6), torch.tensor(1)
        ),
        argument="log_probs",
        outranks_softmax="same shape",
        combines=True,
        has_forward_mode=False,
    ),
)
_PARTS = (
    LossFunction(
        name="softmax",
        reader=_softmax,
        example=lambda z, y: _picked(z.softmax(-1), y),
        kind="softmax",
        rows=_rows_of_softmax,
    ),
    LossFunction(
        name="log_softmax",
        reader=_softmax,
        example=lambda z, y: _picked(z.log_softmax(-1), y),
        kind="log-softmax",
        rows=_rows_of_softmax,
        row_reader=_of_log_softmax,
    ),
    LossFunction(
        name="logsumexp",
        reader=_softmax,
        example=lambda z, y: z.logsumexp(-1).mean() + _picked(z, y),
        kind="sum",
        rows=_rows_of_sum,
    ),
    LossFunction(
        # Of the first classes of a row, the first ones and one more, and so on: of all at most.
        name="logcumsumexp",
        reader=_softmax,
        example=lambda z, y: z.logcumsumexp(-1)[:, -1].mean() + _picked(z, y),
        kind="sum",
        rows=_rows_of_softmax,
    ),
    LossFunction(
        name="sigmoid",
        reader=_sigmoid,
        example=lambda z, y: (z.sigmoid() - _one_hot(z, y)).square().sum(),
        kind="sigmoid",
    ),
    LossFunction(
        name="log_sigmoid",
        reader=_sigmoid,
        example=lambda z, y: -functional.logsigmoid(z * (2 * _one_hot(z, y) - 1)).sum(),
        kind="sigmoid",
        row_reader=_of_log_sigmoid,
    ),
    LossFunction(
        name="softplus",
        reader=_softplus,
        example=lambda z, y: functional.softplus(z * (1 - 2 * _one_hot(z, y))).sum(),
        kind="sigmoid",
        row_reader=_of_softplus,
    ),
)
LOSS_FUNCTIONS = {entry.name: entry for entry in (*_LOSSES, *_PARTS)}


def loss_function(function: Callable[..., Any]) -> LossFunction | None:
    """Return the entry of a torch function, None if losses are not made of it."""
    return LOSS_FUNCTIONS.get(getattr(function, "__name__", "").removeprefix("special_"))
