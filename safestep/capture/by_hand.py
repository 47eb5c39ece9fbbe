"""Find softmaxes and sigmoids that a loss computes by hand, from exponentials."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from safestep.capture.autograd_graph import Node, loss_side

# Operations that add exponentials up, by the name of their node.
_SUMS = (
    "Add", "Sub", "Rsub", "Sum", "Mean", "Cumsum", "Mm", "Bmm", "Mv", "Dot", "IndexAdd",
    "ScatterAdd",
)  # fmt: skip


def is_by_hand(roots: Collection[Node], stops: Collection[Node]) -> bool:
    """Return whether a loss holds a logarithm or a quotient of a sum of exponentials.

    Such a sum vanishes at complex steps, as that of a softmax does, but no call shows its terms.

    Args:
        roots: ``grad_fn`` of the losses.
        stops: Results of softmaxes, sigmoids and losses that are known.

    Returns:
        True for ``log(exp(z).sum())``, ``exp(z) / exp(z).sum()`` and ``1 / (1 + exp(-z))``.

    Example:
        >>> import torch
        >>> z = torch.zeros(2, 3, requires_grad=True)
        >>> is_by_hand([z.exp().sum(-1).log().sum().grad_fn], [])
        True
        >>> is_by_hand([z.exp().sum().grad_fn], [])
        False
    """
    side = loss_side(roots, stops)
    return any(
        _sums_exponentials(operand, side, stops, is_summed=is_summed)
        for node in side
        if node not in stops
        for operand, is_summed in _operands(node)
    )


def _operands(node: Node) -> Iterator[tuple[Node, bool]]:
    """Yield what a logarithm or quotient is singular in, and whether it is a sum by itself."""
    name = _kind(node)
    parts = [following for following, _ in node.next_functions]
    if name in {"Log", "Log2", "Log10", "Log1P", "Reciprocal"}:
        yield parts[0], name == "Log1P"
    elif name == "Div" and len(parts) > 1:
        yield parts[1], False
    elif name in {"Logaddexp", "Logaddexp2"}:
        yield node, False


def _sums_exponentials(
    start: Node, side: Collection[Node], stops: Collection[Node], *, is_summed: bool
) -> bool:
    queue, seen = [(start, is_summed)], set()
    while queue:
        node, is_sum = state = queue.pop()
        if state in seen or node not in side or node in stops:
            continue
        seen.add(state)
        kind = _kind(node)
        if kind.startswith("Logaddexp") or (is_sum and kind in {"Exp", "Exp2"}):
            return True
        is_sum |= kind in _SUMS
        queue += [(following, is_sum) for following, _ in node.next_functions]
    return False


def _kind(node: Node) -> str:
    return type(node).__name__.partition("Backward")[0]
