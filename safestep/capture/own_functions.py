"""Find the logits in the arguments of a user's own ``torch.autograd.Function``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from safestep.capture.autograd_graph import loss_side
from safestep.capture.fused_readers import Part, tiled_logits
from safestep.capture.gradient import GradientEvidence
from safestep.capture.losses import LOSS_FUNCTIONS, LossFunction
from safestep.capture.output_form import OutputForm, examine
from safestep.capture.outputs import traced_loss
from safestep.capture.unwinding import undone

# What may be left of a row's gradient beside the pull of a softmax, as a share of it.
_ROUNDING, _ROUNDING_HALF = 1e-3, 5e-2
_MOST_ROWS = 256  # that are looked at
_unclear: set[str] = set()  # functions whose gradient did not show their logits


def learn(output: Any, run: Callable[[], Any]) -> bool:
    """Add to LOSS_FUNCTIONS the user's Functions whose gradient shows where their logits are.

    An argument holds the logits if the gradient there is that of a softmax with one label in each
    row, smoothed or not. Else the arguments may hold the inputs, weight and labels of a last layer:
    they do if the gradient at the inputs is that of the cross-entropy of their product.

    Args:
        output: What a recorded function returned, with its graph.
        run: Runs the function again and returns its output.

    Returns:
        Whether any was added.
    """
    side = loss_side([tensor.grad_fn for _, tensor in traced_loss(output)])
    own = [type(node) for node in side if isinstance(node, BackwardCFunction)]
    classes = {kind._forward_cls for kind in own}  # pyright: ignore[reportAttributeAccessIssue]
    names = {f"{each.__module__}.{each.__qualname__}" for each in classes}
    learned = [_learn(name, run) for name in sorted(names - _unclear - LOSS_FUNCTIONS.keys())]
    return any(learned)


def _learn(name: str, run: Callable[[], Any]) -> bool:
    calls: list[tuple[Any, ...]] = []

    def listen(*args: Any) -> Iterator[Part]:
        calls.append(args)
        return iter(())

    def forget() -> None:
        LOSS_FUNCTIONS.pop(name, None)

    with undone(forget):
        LOSS_FUNCTIONS[name] = LossFunction(name=name, reader=listen, example=None, is_fused=True)
        loss = [tensor for _, tensor in traced_loss(run())]
    reader = _reader(loss, calls[0]) if calls else None
    if reader is None:
        _unclear.add(name)
        return False
    LOSS_FUNCTIONS[name] = LossFunction(
        name=name, reader=reader, example=None, is_fused=True, rows=reader.row_flags
    )
    return True


def _reader(loss: Sequence[Tensor], args: tuple[Any, ...]) -> _Direct | _Linear | None:
    places = [at for at, arg in enumerate(args) if _is_computed(arg)]
    if not places:
        return None
    gradients = torch.autograd.grad(
        [each.sum() for each in loss], [args[at] for at in places],
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    for at, gradient in zip(places, gradients, strict=True):
        if gradient is None or not bool(gradient.any()):
            continue
        values = args[at].detach()
        form = examine(values, GradientEvidence.of(gradient, output=values))
        if form is not None and form.is_checked and form.class_axis is not None:
            rows = gradient.movedim(form.class_axis, -1)
            return _Direct.of(args, at, form, rows)
        linear = _Linear.of(args, at)
        if linear is not None and linear.explains(args, gradient):
            return replace(linear, ignored=_ignored(args, gradient))
    return None


def _is_computed(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.grad_fn is not None and arg.ndim > 1


@dataclass(frozen=True, slots=True)
class _Direct:
    """An argument holds the logits; rows with a negative label or an ignored one do not count."""

    at: int
    class_axis: int
    temperature: float
    ignored: int | None

    @classmethod
    def of(
        cls, args: tuple[Any, ...], at: int, form: OutputForm, gradient: Tensor
    ) -> _Direct | None:
        """Return the reader if the labels, where they are known, explain the gradient."""
        assert form.class_axis is not None
        temperature, ignored = float(form.temperature), _ignored(args, gradient)
        logits = args[at].movedim(form.class_axis, -1)
        labels = _labels(args, logits.shape[:-1])
        if labels is None:
            return cls(at, form.class_axis, temperature, ignored)
        rows, labels, gradient = _live(logits, labels, gradient)

        def rest(temperature: float) -> float:
            return _rest(_pulls(rows / temperature, labels), gradient)

        temperature = _lowest(rest, temperature)
        is_it = rest(temperature) < _tolerance(gradient)
        return cls(at, form.class_axis, temperature, ignored) if is_it else None

    def __call__(self, *args: Any) -> Iterator[Part]:
        logits = args[self.at].movedim(self.class_axis, -1) / self.temperature
        yield logits, _counted(args, logits.shape[:-1], self.ignored)

    def row_flags(self, flags: Tensor, *args: Any) -> Tensor:
        (logits, _), *_ = self(*args)
        return flags if flags.shape == logits.shape[:-1] else flags.any()


@dataclass(frozen=True, slots=True)
class _Linear:
    """Arguments hold the rows that enter a last layer, its weight and its bias."""

    rows: int
    weight: int
    bias: int | None
    ignored: int | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], rows: int) -> _Linear | None:
        tensors = {at: each for at, each in enumerate(args) if isinstance(each, Tensor)}
        features = args[rows].shape[-1]
        weights = [
            at for at, each in tensors.items()
            if at != rows and each.ndim == 2 and each.shape[1] == features
        ]  # fmt: skip
        if len(weights) != 1 or _labels(args, args[rows].shape[:-1]) is None:
            return None
        classes = len(args[weights[0]])
        biases = [
            at for at, each in tensors.items()
            if each.is_floating_point() and each.shape == (classes,)
        ]  # fmt: skip
        return cls(rows, weights[0], biases[0] if len(biases) == 1 else None)

    def explains(self, args: tuple[Any, ...], gradient: Tensor) -> bool:
        """Return whether a gradient at the rows is that of a cross-entropy, up to row weights."""
        labels = _labels(args, args[self.rows].shape[:-1])
        assert labels is not None
        rows, labels, gradient = _live(args[self.rows], labels, gradient)
        weight = args[self.weight].detach().double()
        logits = rows.double() @ weight.T
        if self.bias is not None:
            logits = logits + args[self.bias].detach().double()
        return _rest(_pulls(logits, labels) @ weight, gradient) < _tolerance(gradient)

    def __call__(self, *args: Any) -> Iterator[Part]:
        rows, bias = args[self.rows], None if self.bias is None else args[self.bias]
        counted = _counted(args, rows.shape[:-1], self.ignored)
        mask = None if counted is None else counted.flatten()
        return tiled_logits(rows.flatten(0, -2), args[self.weight], bias, mask)

    def row_flags(self, flags: Tensor, *args: Any) -> Tensor:
        shape = args[self.rows].shape[:-1]
        return flags.flatten() if flags.numel() == shape.numel() else flags.any()


def _labels(args: tuple[Any, ...], shape: torch.Size) -> Tensor | None:
    """Return the one argument that may hold a label for each row."""
    fitting = [
        each for each in args
        if isinstance(each, Tensor) and each.dtype in (torch.long, torch.int32)
        and each.numel() == shape.numel()
    ]  # fmt: skip
    return fitting[0].long().reshape(shape) if len(fitting) == 1 else None


def _counted(args: tuple[Any, ...], shape: torch.Size, ignored: int | None) -> Tensor | None:
    labels = _labels(args, shape)
    if labels is None or ignored is None:
        return None if labels is None else labels >= 0
    return (labels >= 0) & (labels != ignored)


def _ignored(args: tuple[Any, ...], gradient: Tensor) -> int | None:
    """Return the label of the rows without a gradient, if no other row has it."""
    labels = _labels(args, gradient.shape[:-1])
    if labels is None:
        return None
    live = gradient.ne(0).any(-1)
    idle = labels[~live & (labels >= 0)].unique()
    is_apart = len(idle) == 1 and not bool((labels[live] == idle).any())
    return int(idle) if is_apart else None


def _live(rows: Tensor, labels: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return some of the rows that have a gradient, with their labels and gradients."""
    rows, gradient = rows.detach().flatten(0, -2), gradient.flatten(0, -2)
    some = gradient.ne(0).any(-1).nonzero().flatten()[:_MOST_ROWS]
    return rows[some], labels.flatten()[some], gradient[some]


def _pulls(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what the gradient of a cross-entropy is a sum of, smoothing and z-loss included."""
    probabilities = logits.double().softmax(-1)
    target = torch.zeros_like(probabilities)
    target.scatter_(-1, labels.clamp(0, target.shape[-1] - 1).unsqueeze(-1), 1.0)
    return torch.stack((probabilities, target, torch.ones_like(target)), dim=1)


def _rest(pulls: Tensor, gradient: Tensor) -> float:
    """Return the largest share of a row's gradient that is no sum of multiples of its pulls."""
    columns, wanted = pulls.transpose(1, 2).cpu(), gradient.double().unsqueeze(-1).cpu()
    rest = columns @ torch.linalg.lstsq(columns, wanted, driver="gelsd").solution - wanted
    return float((rest.norm(dim=1) / wanted.norm(dim=1)).max())


def _tolerance(gradient: Tensor) -> float:
    return _ROUNDING_HALF if torch.finfo(gradient.dtype).bits < 32 else _ROUNDING


def _lowest(function: Callable[[float], float], near: float) -> float:
    """Return where a function of a positive number is lowest within a fifth of a guess."""
    low, high = 0.8 * near, 1.25 * near
    for _ in range(40):
        left, right = low ** (2 / 3) * high ** (1 / 3), low ** (1 / 3) * high ** (2 / 3)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low * high) ** 0.5
