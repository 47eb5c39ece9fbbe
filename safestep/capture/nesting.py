"""Find nested log-sum-exps, which sum over combinations of terms, such as sequences."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from safestep.capture.autograd_graph import Node
from safestep.capture.loss_watch import LossInput

_ROUNDING = 1e-2  # half precision


def sums_of_sums(events: Collection[int], seen: Mapping[int, LossInput]) -> frozenset[int]:
    """Return the log-sum-exps whose terms contain other log-sum-exps.

    A nested logsumexp sums over combinations of terms, so the radius depends on the spread of sums
    of logits. Examples are the forward algorithm of a conditional random field and a mixture of
    softmaxes. A log-sum-exp that is subtracted from all terms alike is not nested: the derivative
    with respect to it is an integer, whereas with respect to a term it is a fraction.

    Args:
        events: Indices of the calls that compute a loss.
        seen: The recorded calls, with an autograd graph.

    Returns:
        The nested ones among the events.
    """
    outer = [index for index in events if seen[index].entry.kind == "sum"]
    inner = [index for index in events if seen[index].entry.kind in {"sum", "log-softmax"}]
    return frozenset(
        index
        for index in outer
        if any(_is_term(seen[other], seen[index]) for other in inner if other != index)
    )


def _is_term(inner: LossInput, outer: LossInput) -> bool:
    share = _derivative(outer.result, inner.result)
    if share is None:
        return False
    if inner.dim is not None:  # log_softmax(z) = z - logsumexp(z): derivative by the logsumexp
        share = share.sum(inner.dim)
    return bool(((share - share.round()).abs() > _ROUNDING).any())


def _derivative(result: Node, argument: Node) -> Tensor | None:
    """Return the gradient of the sum of a result with respect to an argument."""
    described = result._input_metadata[0]
    seed = torch.ones(described.shape, dtype=described.dtype, device=described.device)
    (gradient,) = torch.autograd.grad(
        GradientEdge(result, 0), GradientEdge(argument, 0), seed,
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    return gradient
