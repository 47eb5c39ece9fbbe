"""Check the gradient that an optimizer used, by forward mode, which needs no backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from safestep._torch import foreach_mul, foreach_norm
from safestep.capture.call import Call
from safestep.capture.failures import one_line
from safestep.capture.loss_scale import running_loss_scale
from safestep.capture.loss_watch import LossWatch
from safestep.capture.outputs import named_tensors
from safestep.measure.perturb import in_chunks
from safestep.measure.precision import is_half
from safestep.measure.slopes import Slopes
from safestep.parallel.shards import counted_here, local

if TYPE_CHECKING:
    from safestep.measure.update import Update


class GradientAudit:
    """Compare the slope of the loss at the outputs with the gradient's along one update.

    For every path from the parameters p to the loss that leads through an output z of a call,
    <dL/dz, J p> = <dL/dp, p>: the left side needs the tangents J p and what came back to the
    outputs, the right side the gradient that the optimizer used.

    Losses of calls that were passed to ``Recorder.record`` count with their mean.

    Args:
        update: The update whose calls run in forward mode.
    """

    def __init__(self, update: Update) -> None:
        self._update = update
        self._obstacle: str | None = None
        self._terms: list[Tensor] = []  # of each output its slope and its terms' squared norm
        self._awaited = set(map(id, update.calls))
        self._scale: float | None = None

    def see(self, call: Call, output: Any, watch: LossWatch) -> None:
        """Add what one call shows at its first run; its later ones look for something else.

        Args:
            call: The call.
            output: What it returned, with tangents.
            watch: Saw the functions that it called.
        """
        if id(call) not in self._awaited or self._obstacle is not None:
            return
        self._awaited.discard(id(call))
        try:
            self._obstacle = self._added(call, output, watch)
        except Exception as error:  # the radius is measured all the same
            self._obstacle = one_line(error)

    def compared(self) -> Slopes:
        """Return both slopes."""
        if self._obstacle is not None:
            return Slopes(obstacle=self._obstacle)
        try:
            gradient = _gradient_terms(self._update)
            outputs = [term.to(gradient.device) for term in self._terms]
            total = torch.stack(outputs).sum(0) if outputs else torch.zeros_like(gradient)
            (left, left_squares), (right, right_squares) = torch.stack((total, gradient)).tolist()
        except Exception as error:
            return Slopes(obstacle=one_line(error))
        return Slopes(left, right, sqrt(left_squares) + sqrt(right_squares))

    def _added(self, call: Call, output: Any, watch: LossWatch) -> str | None:
        """Add the slope at the outputs of a call.

        Returns:
            Why it is not known, else None.
        """
        if call.lacks:
            return "a call drew random numbers that were not recorded"
        if watch.cut is not None:
            return f"{watch.cut} has no forward-mode derivative"
        if not (call.kept.sums or call.kept.missing):
            return self._add_loss(output)
        ends, obstacle = call.kept.ends()
        outputs = dict(named_tensors(output))
        for name, gradient in ends.items():
            tensor = outputs.get(name)
            if tensor is None or tensor.shape != gradient.shape:
                return f"{name} is another tensor when the call runs again"
            self._add(gradient, _tangent(tensor), 1 / self._loss_scale())
        return obstacle

    def _loss_scale(self) -> float:
        if self._scale is None:
            self._scale = running_loss_scale(is_made=self._update.is_made)
        return self._scale

    def _add_loss(self, output: Any) -> str | None:
        loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
        tangents = [_tangent(tensor) for _, tensor in named_tensors(loss)]
        known = [tangent for tangent in tangents if tangent is not None]
        if len(known) != 1 or known[0].numel() != 1:
            return "the recorded call does not return the loss alone"
        self._add(torch.ones_like(known[0]), known[0], 1 / len(self._update.calls))
        return None

    def _add(self, gradient: Tensor, tangent: Tensor | None, weight: float) -> None:
        if tangent is None:  # the output does not depend on what moved
            return
        product = gradient.double() * tangent.double() * weight
        self._terms.append(torch.stack((product.sum(), product.square().sum())))


def _tangent(tensor: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(tensor).tangent if tensor.is_floating_point() else None


@torch.no_grad()
def _gradient_terms(update: Update) -> Tensor:
    """Return the inner product of gradient and update, and the squared norm of its terms.

    Both are sums over this rank's shards where parameters are sharded. Shape ``[2]``.
    """
    here = [
        is_counted and param.grad is not None
        for is_counted, param in zip(counted_here(update.params), update.params, strict=True)
    ]
    gradients = [local(p.grad) for p in compress(update.params, here) if p.grad is not None]
    sums, norms = [], []
    for ones, others in in_chunks(gradients, compress(update.change, here)):
        pairs = map(_factors, ones, others)
        products = foreach_mul(*map(list, zip(*pairs, strict=True)))
        sums += [product.sum(dtype=torch.float64) for product in products]
        norms += foreach_norm(products)
    if not sums:
        return torch.zeros(2, dtype=torch.float64)
    total, size = (torch.stack([x.to(sums[0].device) for x in each]) for each in (sums, norms))
    return torch.stack((total.sum(), size.double().square().sum()))


def _factors(gradient: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is multiplied entry by entry, in float32 or wider."""
    if gradient.is_sparse:
        change, gradient = change[tuple(gradient._indices())], gradient._values()
    is_coarse = is_half(gradient.dtype) or is_half(change.dtype)
    dtype = torch.float32 if is_coarse else torch.promote_types(gradient.dtype, change.dtype)
    return gradient.to(dtype), change.to(dtype)
