"""Compute the gradient of recorded calls once more, and tell where the one in use differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safestep.capture.gradient_hooks import without_gradient_hooks
from safestep.capture.isolation import without_side_effects
from safestep.measure.loss_ends import LossEnds

if TYPE_CHECKING:
    from safestep.measure.update import Update

# Returns the mean over the ranks of the tensors that each rank computes.
Mean = Callable[[Callable[[], Sequence[Tensor]]], Sequence[Tensor]]

# Sine of the angle up to which one gradient is the other, and share by which it may be longer: what
# rounding and the order of sums may do.
_SINE, _LONGER = 1e-4, 1e-4
_SINE_COARSE, _LONGER_COARSE = 0.03, 0.03


@dataclass(frozen=True, slots=True)
class SecondGradient:
    """How the gradient in use compares with one that was computed once more.

    Attributes:
        slope: Slope of the loss along the update, from the second gradient.
        factor: Length of the gradient in use along the second one, in lengths of that.
        is_parallel: Whether the two differ in length alone.
        is_shrunk: Whether it is shorter because every parameter's gradient is the second one, as
            long or shorter, or because all entries are cut off at one size: what clipping does.
        place: Index of the parameter that makes most of the difference along the update.
    """

    slope: float
    factor: float
    is_parallel: bool
    is_shrunk: bool
    place: int

    @classmethod
    def of(
        cls, update: Update, module: nn.Module, *, is_coarse: bool, mean: Mean | None = None
    ) -> SecondGradient:
        """Run the calls and their backward passes again, and compare.

        Args:
            update: The update.
            module: The root module of its calls.
            is_coarse: Whether anything was computed in half precision.
            mean: Averages gradients over the ranks, which must all call this; None on a lone rank.

        Returns:
            The comparison.

        Raises:
            RuntimeError: If the calls or their backward passes cannot run again.
        """
        trained = [i for i, param in enumerate(update.params) if param.grad is not None]
        params = [update.params[i] for i in trained]
        with update.at_start():
            make = partial(_gradients, update, params, module)
            seconds = make() if mean is None else mean(make)
        gradients = [_dense(param.grad) for param in params]
        largest = torch.stack([gradient.abs().amax().double() for gradient in gradients]).amax()
        rows = [
            _products(gradient, second, _dense(update.change[i]), largest)
            for i, gradient, second in zip(trained, gradients, seconds, strict=True)
        ]
        table = torch.stack([row.to(rows[0].device) for row in rows]).cpu()
        sine, longer = (_SINE_COARSE, _LONGER_COARSE) if is_coarse else (_SINE, _LONGER)
        return _compared(table, trained, sine=sine, longer=longer)


def _compared(
    table: Tensor, trained: Sequence[int], *, sine: float, longer: float
) -> SecondGradient:
    used, slopes, both, own, others, rest = table.unbind(1)
    factor = float(both.sum() / others.sum())
    apart = own - both * both / others.clamp(min=torch.finfo(others.dtype).tiny)
    is_shorter = bool(((both <= (1 + longer) * others) & (apart <= sine**2 * own)).all())
    is_clamped = bool(rest.sum() <= sine**2 * own.sum())
    return SecondGradient(
        slope=float(slopes.sum()),
        factor=factor,
        is_parallel=bool(own.sum() - factor * both.sum() <= sine**2 * own.sum()),
        is_shrunk=factor < 1 - longer and (is_clamped or is_shorter),
        place=trained[int((used - slopes).abs().argmax())],
    )


def _gradients(update: Update, params: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    ends = LossEnds(update.calls, is_made=update.is_made)
    total = [torch.zeros_like(param, memory_format=torch.preserve_format) for param in params]
    for call in update.calls:
        isolated = without_side_effects(module, call.unused_generators)
        unhooked = without_gradient_hooks(module, params)
        with update.alone(), isolated, unhooked, torch.enable_grad():
            pairs = list(ends.of(call, call.run(), _has_graph))
            roots, seeds = map(list, zip(*pairs, strict=True))
            found = torch.autograd.grad(roots, params, seeds, allow_unused=True)
        for sum_so_far, gradient in zip(total, found, strict=True):
            if gradient is not None:
                sum_so_far.add_(gradient)
    return total


def _products(gradient: Tensor, second: Tensor, change: Tensor, largest: Tensor) -> Tensor:
    """Return sums of one parameter in float64: slopes, products, and what clamping leaves."""
    g, h, p = gradient.double(), second.double(), change.double()
    rest = g - h.clamp(min=-largest, max=largest)
    pairs = ((g, p), (h, p), (g, h), (g, g), (h, h), (rest, rest))
    return torch.stack([(one * other).sum() for one, other in pairs])


def _dense(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_dense() if tensor.is_sparse else tensor.detach()


def _has_graph(tensor: Tensor) -> bool:
    return tensor.grad_fn is not None
