"""Check the gradient that an optimizer used, by forward mode, which needs no backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from safestep._torch import foreach_mul, foreach_norm
from safestep.capture.call import Call
from safestep.capture.failures import one_line
from safestep.capture.loss_watch import LossWatch
from safestep.measure.loss_ends import LossEnds, UnknownGradientError
from safestep.measure.perturb import in_chunks
from safestep.measure.slopes import Slopes
from safestep.parallel.placements import placed_like, shares

if TYPE_CHECKING:
    from safestep.measure.update import Update

# Returns the gradient of each parameter on this rank before the all-reduce, or raises LookupError
# with the reason why they are not known.
OwnGradients = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


class GradientAudit:
    """Compare the slope of the loss at the outputs with the gradient's along one update.

    For every path from the parameters p to the loss that leads through an output z of a call,
    <dL/dz, J p> = <dL/dp, p>: the left side needs the tangents J p and what came back to the
    outputs, the right side the gradient that the optimizer used.

    Args:
        update: The update whose calls run in forward mode.
        own: Returns the gradients before the all-reduce, to audit them too; None on a lone rank.
    """

    def __init__(self, update: Update, own: OwnGradients | None = None) -> None:
        self._update, self._before_reduction = update, own
        self._obstacle = update.gradient_obstacle
        self._terms: list[Tensor] = []  # of each output its slope and its terms' squared norm
        self._awaited = set(map(id, update.calls))
        self._own = frozenset(update.params)
        self._ends = LossEnds(update.calls, is_made=update.is_made)

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
            self._add(call, output, watch)
        except Exception as error:  # the radius is measured all the same
            self._obstacle = one_line(error)

    def compared(self, *, is_coarse: bool) -> Slopes:
        """Return both slopes.

        Args:
            is_coarse: Whether anything was computed in half precision.
        """
        if self._obstacle is not None:
            return Slopes(obstacle=self._obstacle, own=Slopes(obstacle=self._obstacle))
        gradients: list[Sequence[Tensor | None]] = [[p.grad for p in self._update.params]]
        own = Slopes()
        if self._before_reduction is not None:
            try:
                gradients.append(self._before_reduction(self._update.params))
            except LookupError as error:
                own = Slopes(obstacle=str(error))
        try:
            left, right, *before = self._read([_terms(self._update, each) for each in gradients])
            if before:
                own = _slopes(left, before[0], self._ends.loss_scale(), is_coarse=is_coarse)
        except Exception as error:
            return Slopes(obstacle=one_line(error), own=Slopes(obstacle=one_line(error)))
        return replace(_slopes(left, right, is_coarse=is_coarse), own=own)

    def _read(self, rows: list[Tensor]) -> list[list[float]]:
        """Return the terms of the outputs, then those of the gradients, with one wait."""
        device = rows[0].device
        outputs = [term.to(device) for term in self._terms]
        total = torch.stack(outputs).sum(0) if outputs else torch.zeros_like(rows[0])
        return torch.stack([total, *(row.to(device) for row in rows)]).tolist()

    def _add(self, call: Call, output: Any, watch: LossWatch) -> None:
        if call.lacks:
            raise UnknownGradientError("a call drew random numbers that were not recorded")
        if call.kept.have_moved(self._own):
            raise UnknownGradientError("another optimizer moved parameters after the backward pass")
        if call.is_elsewhere:
            raise UnknownGradientError("the parameters moved between the forward call and the step")
        if watch.cut is not None:
            raise UnknownGradientError(f"{watch.cut} has no forward-mode derivative")
        for tensor, gradient in self._ends.of(call, output, _has_tangent):
            tangent = _tangent(tensor)
            assert tangent is not None  # else `of` does not yield the tensor
            product = gradient.double() * tangent.double()
            self._terms.append(torch.stack((product.sum(), product.square().sum())))


def _has_tangent(tensor: Tensor) -> bool:
    return _tangent(tensor) is not None


def _tangent(tensor: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(tensor).tangent if tensor.is_floating_point() else None


def _slopes(
    left: Sequence[float], right: Sequence[float], scale: float = 1.0, *, is_coarse: bool
) -> Slopes:
    """Return the slopes of outputs and gradient, where the gradient still holds the loss scale."""
    size = sqrt(left[1]) + sqrt(right[1]) / scale
    return Slopes(left[0], right[0] / scale, size, is_coarse=is_coarse)


@torch.no_grad()
def _terms(update: Update, gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the inner product of a gradient and the update, and the squared norm of its terms.

    Both are sums over this rank's shards where parameters are sharded. Shape ``[2]``.
    """
    own_shares = [
        share if gradient is not None else 0.0
        for share, gradient in zip(shares(update.params), gradients, strict=True)
    ]
    sums, norms = [], []
    for share in set(own_shares) - {0.0}:
        here = [each == share for each in own_shares]
        pairs = zip(compress(gradients, here), compress(update.params, here), strict=True)
        found = [placed_like(gradient, param) for gradient, param in pairs]
        for ones, others in in_chunks(found, compress(update.change, here)):
            factors = map(_factors, ones, others)
            products = foreach_mul(*map(list, zip(*factors, strict=True)))
            sums += [product.sum(dtype=torch.float64) * share for product in products]
            norms += [norm * sqrt(share) for norm in foreach_norm(products)]
    if not sums:
        return torch.zeros(2, dtype=torch.float64)
    total, size = (torch.stack([x.to(sums[0].device) for x in each]) for each in (sums, norms))
    return torch.stack((total.sum(), size.double().square().sum()))


def _factors(gradient: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is multiplied entry by entry, in float32 or wider."""
    if gradient.is_sparse:
        change, gradient = change[tuple(gradient._indices())], gradient._values()
    dtype = torch.promote_types(gradient.dtype, change.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return gradient.to(dtype), change.to(dtype)
