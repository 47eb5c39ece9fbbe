"""Find the parts of a loss whose logits no known function is given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch.autograd.function import BackwardCFunction

from safestep.capture.autograd_graph import Node, is_behind, kind_of, loss_side, signed

# Operations that add exponentials up, by the name of their node.
_SUMS = (
    "Add", "Sub", "Rsub", "Sum", "Mean", "Cumsum", "Mm", "Bmm", "Mv", "Dot", "IndexAdd",
    "ScatterAdd",
)  # fmt: skip


def hidden_parts(roots: Collection[Node], stops: Collection[Node]) -> list[str]:
    """Return the parts of a loss that may be a softmax or sigmoid of logits that are not seen.

    A sum of exponentials vanishes at complex steps, as that of a softmax does. A user's own
    ``torch.autograd.Function`` may hold anything.

    Args:
        roots: ``grad_fn`` of the losses.
        stops: Results of softmaxes, sigmoids and losses that are known.

    Returns:
        What each part is, and what to do.

    Example:
        >>> import torch
        >>> z = torch.zeros(2, 3, requires_grad=True)
        >>> hidden_parts([z.exp().sum(-1).log().sum().grad_fn], [])[0].partition(". ")[0]
        'the logarithm or quotient of a sum of exponentials, a softmax or sigmoid written by hand'
        >>> hidden_parts([z.exp().sum().grad_fn], [])
        []
    """
    side = loss_side(roots, stops)
    nodes = side.difference(stops)
    is_by_hand = any(
        _sums_exponentials(operand, nodes, is_summed=is_summed)
        for node in nodes
        for operand, is_summed in _operands(node)
    )
    own = {
        type(node).__name__.removesuffix("Backward")
        for node in nodes
        if isinstance(node, BackwardCFunction) and not any(is_behind(node, stop) for stop in stops)
    }
    return [_BY_HAND] * is_by_hand + [_OF_A_FUNCTION.format(name) for name in sorted(own)]


def may_hide(nodes: Iterable[Node]) -> bool:
    """Return whether a loss can hold what ``hidden_parts`` and ``mixes_rows`` look for.

    Args:
        nodes: Its nodes.
    """
    return any(kind_of(node) in _SINGULAR or isinstance(node, BackwardCFunction) for node in nodes)


def mixes_rows(roots: Collection[Node], stops: Collection[Node]) -> bool:
    """Return whether a loss is singular where a sum of probabilities over rows vanishes.

    Dice divides by such a sum, the entropy of mean predictions takes its logarithm. A probability
    is 1 / sum_j exp(z_j - z_k + (a_j - a_k) t). Up to |t| = pi / (2 D), half the radius pi / D,
    every term has a positive real part. So have each probability and every sum of probabilities
    with positive weights, and the loss is analytic there. Beyond it, a sum over rows may vanish.

    Args:
        roots: ``grad_fn`` of the losses.
        stops: Results of softmaxes, sigmoids and losses that are known.

    Returns:
        Whether there is a logarithm or quotient of such a sum.

    Example:
        >>> import torch
        >>> p = torch.zeros(2, 3, requires_grad=True).softmax(-1)
        >>> [mixes_rows([p.sum(axis).log().sum().grad_fn], [p.grad_fn]) for axis in (0, 1)]
        [True, False]
    """
    nodes = loss_side(roots, stops)
    return any(
        _sums_probabilities(operand, nodes, stops)
        for node in nodes
        for operand, _ in _operands(node)
    )


_LOGARITHMS = frozenset({"Log", "Log2", "Log10", "Log1P", "Reciprocal"})
_SINGULAR = _LOGARITHMS | {"Div", "Logaddexp", "Logaddexp2"}
_BY_HAND = (
    "the logarithm or quotient of a sum of exponentials, a softmax or sigmoid written by hand. "
    "Write it with torch.softmax, log_softmax, logsumexp or softplus"
)
_OF_A_FUNCTION = (
    "{}, a torch.autograd.Function. Without guard.record its gradient at what the model returns "
    "may show the logits; or write it with torch's own functions"
)


def _operands(node: Node) -> Iterator[tuple[Node, bool]]:
    """Yield what a logarithm or quotient is singular in, and whether it is a sum by itself."""
    name = kind_of(node)
    parts = [following for following, _ in node.next_functions]
    if name in _LOGARITHMS:
        yield parts[0], name == "Log1P"
    elif name == "Div" and len(parts) > 1:
        yield parts[1], False
    elif name in {"Logaddexp", "Logaddexp2"}:
        yield node, False


def _sums_probabilities(start: Node, nodes: Collection[Node], stops: Collection[Node]) -> bool:
    queue: list[tuple[Node, tuple[int, int] | None, bool]] = [(start, None, False)]
    seen = set()
    while queue:
        node, axis, is_summed = state = queue.pop()
        if state in seen or node not in nodes:
            continue
        seen.add(state)
        kind = kind_of(node)
        if node in stops:
            is_own = kind == "Softmax" and not is_summed and axis == _axis(node)
            if (axis or is_summed) and kind in {"Softmax", "Sigmoid"} and not is_own:
                return True
            continue
        if kind in {"Sum", "Mean"} and axis is None:  # over its own classes, a sum is one row's
            axis, is_summed = _axis(node), is_summed or _axis(node) is None
        else:
            is_summed |= kind in _SUMS_OF_ROWS
        queue += [(following, axis, is_summed) for following, _ in node.next_functions]
    return False


_SUMS_OF_ROWS = frozenset(_SUMS) - {"Add", "Sub", "Rsub"}


def _axis(node: Node) -> tuple[int, int] | None:
    """Return the one axis that a sum or softmax runs over, and the number of axes."""
    dim = getattr(node, "_saved_dim", ())
    dims = dim if isinstance(dim, tuple) else (dim,)
    if len(dims) != 1:
        return None
    argument, index = node.next_functions[0]
    count = len(argument._input_metadata[index].shape)
    return signed(dims[0]) % count, count


def _sums_exponentials(start: Node, nodes: Collection[Node], *, is_summed: bool) -> bool:
    queue, seen = [(start, is_summed)], set()
    while queue:
        node, is_sum = state = queue.pop()
        if state in seen or node not in nodes:
            continue
        seen.add(state)
        kind = kind_of(node)
        if kind.startswith("Logaddexp") or (is_sum and kind in {"Exp", "Exp2"}):
            return True
        is_sum |= kind in _SUMS
        queue += [(following, is_sum) for following, _ in node.next_functions]
    return False
