"""Log-sum-exps of log-sum-exps, which are sums over combinations, as of sequences."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from safestep.capture.autograd_graph import Node
from safestep.capture.losses import LossInput

SUMS = frozenset({"logsumexp", "special_logsumexp"})
_NORMALISERS = frozenset({"log_softmax", "special_log_softmax"})
_ROUNDING = 1e-2  # half precision


def sums_of_sums(events: Collection[int], seen: Mapping[int, LossInput]) -> frozenset[int]:
    """Return the log-sum-exps whose terms hold log-sum-exps of their own.

    exp of such a one is a sum over all combinations of the terms, so its zeros answer to the spread
    of sums of logits and not to that of one set. The forward algorithm of a conditional random
    field is like that, and a mixture of softmaxes. A log-sum-exp that is taken off all terms alike
    is harmless: its share in the gradient of each is 1, where that of a term is a fraction.

    Args:
        events: The calls that a loss is made of, by their index.
        seen: What was seen of them, while an autograd graph was built.

    Returns:
        Which of the events are such.
    """
    outer = [index for index in events if seen[index].function in SUMS]
    inner = [index for index in events if seen[index].function in SUMS | _NORMALISERS]
    return frozenset(
        index
        for index in outer
        if any(_is_term(seen[other], seen[index]) for other in inner if other != index)
    )


def _is_term(inner: LossInput, outer: LossInput) -> bool:
    share = _derivative(outer.result, inner.result)
    if share is None:
        return False
    if inner.dim is not None:  # of log_softmax(z) = z - logsumexp(z), the share of the sum
        share = share.sum(inner.dim)
    return bool(((share - share.round()).abs() > _ROUNDING).any())


def _derivative(result: Node, argument: Node) -> Tensor | None:
    """Return the gradient of the sum of a result, which each of its elements has a part in."""
    described = result._input_metadata[0]
    seed = torch.ones(described.shape, dtype=described.dtype, device=described.device)
    (gradient,) = torch.autograd.grad(
        GradientEdge(result, 0), GradientEdge(argument, 0), seed,
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    return gradient
