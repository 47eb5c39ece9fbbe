"""The part of an autograd graph that lies between a loss and the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from safestep._torch import current_node, is_executed

# What changes shape, strides or dtype of a tensor and leaves its numbers alone.
_VIEWS = frozenset(
    f"{name}Backward{version}"
    for version in (0, 1)
    for name in (
        "Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T",
        "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View",
    )
)  # fmt: skip

# What keeps probabilities away from 0 and 1.
CLAMPS = frozenset(f"Clamp{end}Backward{n}" for end in ("", "Min", "Max") for n in (0, 1))

Node = Any  # torch.autograd.graph.Node, whose attributes differ by operation


def loss_side(roots: Iterable[Node], stops: Collection[Node] = ()) -> set[Node]:
    """Return the nodes that a loss is made of, up to the last operation that has a parameter.

    A softmax among them belongs to the loss; one behind them, such as an attention's, to the model.
    A parameter of one element (a learned weight of a loss, a learned temperature) is not a model.

    Args:
        roots: ``grad_fn`` of the losses.
        stops: Nodes that are not looked behind either.

    Returns:
        The nodes, those where the search ended included.
    """
    found: set[Node] = set()
    queue = list(roots)
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node not in stops and not _has_parameter(node):
            queue.extend(following for following, _ in node.next_functions)
    return found


def view_chain(node: Node, through: Collection[str] = ()) -> Iterator[Node]:
    """Walk from a node through views and casts of one tensor to the operation that computed it.

    Args:
        node: The ``grad_fn`` of a tensor.
        through: Names of further operations to walk through.

    Yields:
        The nodes on the way, the one given first.
    """
    while node is not None:
        yield node
        name = type(node).__name__
        if name not in _VIEWS and name not in through:
            return
        node = node.next_functions[0][0]


def is_behind(node: Node, target: Node) -> bool:
    """Return whether `target` is `node` or one of the nodes that it was computed from."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current is target:
            return True
        if current is not None and current not in seen:
            seen.add(current)
            queue.extend(following for following, _ in current.next_functions)
    return False


def trains_any(params: Iterable[Tensor]) -> bool:
    """Return whether the backward pass under way computes a gradient of any of the parameters.

    ``torch.autograd.grad(score, inputs)`` and ``backward(inputs=...)`` may not, though they pass
    through the same outputs. Call it inside a hook on a gradient.

    Args:
        params: The parameters.

    Returns:
        False if none gets a gradient. True also where that cannot be told: behind a function that
        starts a backward pass of its own, as a re-entrant checkpoint does.
    """
    accumulators = []
    for param in params:  # mostly, the first one settles it
        if param.requires_grad:
            accumulators.append(get_gradient_edge(param).node)
            if _is_executed(accumulators[-1]):
                return True
    current = current_node()
    return bool(accumulators) and not any(is_behind(current, node) for node in accumulators)


def _is_executed(accumulator: Node) -> bool:
    try:
        return is_executed(accumulator)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


def _has_parameter(node: Node) -> bool:
    for following, _ in node.next_functions:
        *_, origin = (None, *view_chain(following))
        variable = getattr(origin, "variable", None)
        if variable is not None and variable.numel() > 1:
            return True
    return False
