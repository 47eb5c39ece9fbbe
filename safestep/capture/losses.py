"""See what a training step hands to its loss functions while it runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from safestep.capture import fused_logits as tiles
from safestep.capture.autograd_graph import Node
from safestep.capture.vmap import all_examples, held, is_batched

Part = tuple[Tensor | tiles.LinearTile, Tensor | None]


@dataclass(frozen=True, slots=True)
class LossInput:
    """Logits that a function of a loss was given.

    Attributes:
        function: Name of the function.
        parts: The logits, classes last, ``[*B, C]``, or tiles of them; and with each
            a mask, True where a row counts, None if all do.
        is_loss: Whether the function is a loss; a softmax may also be a part of the model.
        is_trained: Whether the logits, not only the target, have a gradient.
        prediction: Node of the autograd graph that the argument came from, if it has one.
        result: Node of the result.
        is_reduced: Whether the rows are summed up in the result, so that all weigh alike.
        dim: Axis of the classes, of a softmax.
    """

    function: str
    parts: tuple[Part, ...]
    is_loss: bool
    is_trained: bool
    prediction: Node | None
    result: Node | None
    is_reduced: bool
    dim: int | None = None


class LossWatch(TorchFunctionMode):
    """Collect the input of every loss function, softmax and sigmoid that is called inside.

    Only around a re-run, never around the user's own loop.

    Args:
        keep: Collect only the calls with these indices: an attention's scores are not held.

    Attributes:
        names: Names of the functions, in the order of the calls.
        seen: What was collected, by the index of the call.
        dtypes: Types of floating point of everything that was computed: a function may enter an
            autocast region of its own, or cast.

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
        name = getattr(func, "__name__", "")
        reader = READERS.get(name)
        if reader is None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                with torch._C.DisableTorchFunction():  # no other mode needs to see these questions
                    if result.is_floating_point():
                        self.dtypes.add(result.dtype)
            return result
        is_linear = name == "linear_cross_entropy"
        if is_linear or name == "ctc_loss":
            # Its forward-mode derivative would hold every logit, or does not exist.
            result = func(*tree_map(tiles.primal, args), **tree_map(tiles.primal, kwargs))
        else:
            result = func(*args, **kwargs)
        if self.keep is None or len(self.names) in self.keep:
            argument = args[0] if args else kwargs["log_probs" if name == "ctc_loss" else "input"]
            self.seen[len(self.names)] = LossInput(
                name,
                tuple(_with_rows(_of_all_examples(part)) for part in reader(*args, **kwargs)),
                is_loss=name in _LOSSES,
                is_trained=held(result if is_linear else argument).requires_grad,
                prediction=held(argument).grad_fn,
                result=held(result).grad_fn,
                is_reduced=is_batched(result) or (name in _LOSSES and result.ndim == 0),
                dim=_class_axis(*args, **kwargs) if name.endswith("softmax") else None,
            )
        self.names.append(name)
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


def row_flags(function: str, flags: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return which rows of its logits a result of a function belongs to.

    Args:
        function: Name of the function.
        flags: True for elements of its result.
        *args: What the function was called with.
        **kwargs: Likewise.

    Returns:
        True for rows. Shape ``[*B]``, or ``[]`` where the result is one number.
    """
    if flags.ndim == 0:
        return flags
    if function == "kl_div":
        return flags.any(-1)
    if function.endswith("softmax"):
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        return _classes_last(flags, *args[1:], **kwargs).any(-1)
    if function.endswith("logsumexp"):
        return flags.reshape(_classes_last(*args, **kwargs).shape[:-1])
    return flags


# The readers below are called like the torch functions they are named after, so their arguments
# have torch's names. Each yields logits and the rows of them that count.


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
    yield logits, _labelled(target, weight, ignore_index, label_smoothing)


def _labelled(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
) -> Tensor | None:
    """Return True for rows with a label that counts, None for all."""
    if target.is_floating_point():
        if label_smoothing > 0:
            return None
        return (target if weight is None else target * weight).ne(0).any(-1)
    mask = target != (-100 if ignore_index is None else ignore_index)
    if weight is not None and label_smoothing == 0:
        mask = mask & weight[target.clamp(0, len(weight) - 1)].ne(0)
    return mask


def _linear_cross_entropy(
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
    classes, *positions, features = linear_weight.shape
    rows = input.reshape(-1, features)
    matrix = _held(linear_weight).reshape(-1, features)
    bias = None if linear_bias is None else _held(linear_bias).flatten()
    if target.is_floating_point() and target.ndim > 1:
        target = target.movedim(1, -1)
    mask = _labelled(target, weight, ignore_index, label_smoothing)
    mask = None if mask is None else mask.reshape(len(rows), *positions)
    size = max(1, tiles.TILE_ELEMENTS // len(matrix))
    for begin in range(0, len(rows), size):
        tile = tiles.LinearTile(rows[begin : begin + size], matrix, bias, (classes, *positions))
        yield tile, None if mask is None else mask[begin : begin + size]


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
    yield _classes_last(input, *args, **kwargs), None


def _classes_last(
    input: Tensor, dim: int | tuple[int, ...] | None = None, *_: object, **__: object
) -> Tensor:
    dim = _class_axis(input) if dim is None else dim
    axes = (dim,) if isinstance(dim, int) else dim
    return input.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))


def _class_axis(input: Tensor, dim: int | None = None, *_: object, **__: object) -> int:
    if dim is None:  # what torch takes where no dim is given, with a warning of its own
        return 0 if input.ndim in (0, 1, 3) else 1
    return dim


def _sigmoid(input: Tensor, *_: object, **__: object) -> Iterator[Part]:
    yield binary_rows(input), None


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Iterator[Part]:
    yield binary_rows(beta * input), None


def _with_rows(part: Part) -> Part:
    """Return a part of one row without an axis for rows as a part with one."""
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


def _held(parameter: Tensor) -> Tensor:
    """Return a parameter as it is now, for a product that is computed later."""
    # A dual one cannot outlive its run; another may be moved before the product is.
    is_dual = forward_ad.unpack_dual(parameter).tangent is not None
    return parameter if is_dual else parameter.detach().clone()


_LOSSES: dict[str, Callable[..., Iterator[Part]]] = {
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    # Log-probabilities are the logits up to a shift of each row, which changes no spread.
    "nll_loss": _cross_entropy,
    "binary_cross_entropy_with_logits": _binary_cross_entropy_with_logits,
    "binary_cross_entropy": _binary_cross_entropy,
    "kl_div": _kl_div,
    "ctc_loss": _ctc_loss,
}
READERS = _LOSSES | {
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
