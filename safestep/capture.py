"""Layer 1: find the logits among what a model returns, and the rows of them that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from safestep.losses import LossInput, LossWatch

if TYPE_CHECKING:
    from safestep.replay import Call

# |sum| / sum|.| of dL/dlogits over the classes: measured 1e-8 (float32), 7e-4 (bfloat16) for losses
# of softmax probabilities, .2 to .5 for MSE and binary cross-entropy.
_ZERO_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ZERO_SUM_TOLERANCE_HALF = 1e-2

LogitsFn = Callable[[Any], Tensor]


class LogitsNotFoundError(RuntimeError):
    """No tensor of the output is known to enter a softmax; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits that enter one softmax.

    Attributes:
        name: Where they were found, as a user would say it.
        values: The logits, classes last. Shape ``[*B, C]``.
        mask: True where a row counts, None if all do. Shape ``[*B]``.
    """

    name: str
    values: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GradientEvidence:
    """What dL/doutput says about an output: a softmax loss is blind to a shift of its logits.

    Attributes:
        class_axis: The axis over which the gradient sums to zero, None if there is none.
        counted: True where a row has any gradient. Shape of the output without its class axis.
    """

    class_axis: int | None
    counted: Tensor | None

    @classmethod
    def of(cls, gradient: Tensor, class_axis: int | None = None) -> GradientEvidence:
        """Inspect a gradient; a class axis that is already known is not looked for again.

        Args:
            gradient: Gradient of the loss with respect to an output. Any shape.
            class_axis: The axis, if it is known.

        Returns:
            The class axis and the rows that count.
        """
        if class_axis is None:
            class_axis = _zero_sum_axis(gradient)
        if class_axis is None:
            return cls(None, None)
        return cls(class_axis, gradient.ne(0).any(class_axis))


def named_tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Walk through tensors, mappings, sequences and dataclasses, yielding names and tensors.

    Args:
        output: What a model returned.
        name: What to call it.

    Yields:
        A name such as ``output.logits`` or ``output[0]``, and the tensor.
    """
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_tensors(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from named_tensors(value, f"{name}[{index}]")
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from named_tensors(getattr(output, field.name), f"{name}.{field.name}")


def find_logits(call: Call, logits: LogitsFn | None = None) -> list[Logits]:
    """Run a call again and return the logits that its loss is a function of.

    The user's word comes first, then what loss functions were given inside the call, then the
    tensors of its output whose gradient shows that they enter a softmax, and last, in a call that
    returns a loss, what a softmax or sigmoid was given.

    Args:
        call: The call to run again.
        logits: The user's own way from the output to the logits, which is then believed.

    Returns:
        One entry for each tensor that enters a softmax.

    Raises:
        LogitsNotFoundError: If nothing behaves like logits.
        TypeError: If `logits` does not return a tensor.
    """
    with LossWatch() as watch:
        output = call.run()
    if logits is not None:
        values = logits(output)
        if not isinstance(values, Tensor):
            raise TypeError(
                "SafeStep: expected `logits` to return a tensor with the classes on its last "
                f"axis, got {type(values).__name__}."
            )
        return [Logits("logits(output)", values)]
    found = [_seen(item) for item in watch.seen if item.is_loss] or _of_output(call, output)
    if not found and not call.gradients:
        found = [_seen(item) for item in watch.seen if _moves(item.logits)]
    if not found:
        raise LogitsNotFoundError(
            "the gradient of the loss does not sum to zero over any axis of the model's output, "
            "so no tensor of it is known to enter a softmax; if one does, pass "
            "logits=lambda output: ... to SafeStep"
        )
    return found


def _seen(item: LossInput) -> Logits:
    return Logits(f"input of {item.function}", item.logits, item.mask)


def _of_output(call: Call, output: Any) -> list[Logits]:
    found = []
    for name, tensor in named_tensors(output):
        evidence = call.gradients.get(name)
        if evidence is not None and evidence.class_axis is not None:
            values = tensor.movedim(evidence.class_axis, -1)
            found.append(Logits(name, values, evidence.counted))
    return found


def _moves(logits: Tensor) -> bool:
    return forward_ad.unpack_dual(logits).tangent is not None


def _zero_sum_axis(gradient: Tensor) -> int | None:
    if gradient.ndim == 0:
        return None
    tolerance = _ZERO_SUM_TOLERANCE.get(gradient.dtype, _ZERO_SUM_TOLERANCE_HALF)
    total = gradient.abs().sum(dtype=torch.float64)
    # Classes are last, or second as in [B, C, H, W]; the remaining axes are asked in order.
    axes = [axis for axis in (gradient.ndim - 1, 1, *range(gradient.ndim)) if axis < gradient.ndim]
    for axis in dict.fromkeys(axes):
        residual = gradient.sum(axis, dtype=torch.float64).abs().sum()
        if gradient.shape[axis] > 1 and bool(residual <= tolerance * total) and bool(total > 0):
            return axis
    return None
