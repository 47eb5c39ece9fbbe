"""The part of an autograd graph that lies between a loss and the model."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from math import inf
from types import FrameType
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from safestep._torch import current_node, is_executed, run_backward
from safestep.parallel.shards import is_sharded

# Operations that change shape, strides or dtype of a tensor but not its values.
VIEWS = frozenset(
    f"{name}Backward{version}"
    for version in (0, 1)
    for name in (
        "Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T",
        "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View",
    )
)  # fmt: skip

# A parameter that is only added may belong to the loss: a class prior, the transitions of a CRF.
_SHIFTS = frozenset({"Add", "Sub", "Rsub"})

# Operations that keep probabilities away from 0 and 1.
CLAMPS = frozenset(f"Clamp{end}Backward{n}" for end in ("", "Min", "Max") for n in (0, 1))

# The first operations tell losses apart; behind a second model's output there may be thousands.
_MOST_OPERATIONS = 64

Node = Any  # torch.autograd.graph.Node, whose attributes differ by operation


def kind_of(node: Node) -> str:
    """Return the operation of a node, such as ``"Sum"``."""
    return type(node).__name__.partition("Backward")[0]


def signed(axis: int) -> int:
    """Return a saved axis with its sign: nodes show a negative one as an unsigned integer."""
    return axis - 2**64 if axis >= 2**63 else axis


def loss_side(
    roots: Iterable[Node], stops: Collection[Node] = (), at_most: float = inf
) -> set[Node]:
    """Return the nodes that compute a loss, back to the last operations that use a parameter.

    A softmax among them belongs to the loss; one behind them, as in attention, to the model. A
    parameter that is added, or of one element (a learned loss weight or temperature), does not
    count as a parameter.

    Args:
        roots: ``grad_fn`` of the losses.
        stops: Further nodes at which the search ends.
        at_most: Largest number of nodes.

    Returns:
        The nodes, including those at which the search ended; empty if there are more.
    """
    found: set[Node] = set()
    queue = list(roots)
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if len(found) > at_most:
            return set()
        if node not in stops and not _has_parameter(node):
            queue.extend(following for following, _ in node.next_functions)
    return found


def operations_of_loss() -> str | None:
    """Return the operations between a loss and an output; call it in a hook on its gradient.

    They tell one loss from another without a look at any number; two that are compiled with the
    model look alike.

    Returns:
        Names of the nodes of up to 64 operations, sorted, each once; None if the graph does not
        show them, as when C++ began the backward pass.
    """
    output, queue = current_node(), deque(roots_of_backward())
    if not queue:
        return None
    found: set[Node] = set()
    while queue and len(found) < _MOST_OPERATIONS:
        node = queue.popleft()
        if node is not None and node is not output and node not in found:
            found.add(node)
            queue.extend(following for following, _ in node.next_functions)
    return " ".join(sorted({type(node).__name__ for node in found}))


def roots_of_backward() -> list[Node]:
    """Return the nodes at which the backward pass under way began."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not run_backward.__code__:
        frame = frame.f_back
    if frame is None:  # a device's own thread runs the hooks, while the caller waits
        waiting = [top for top in sys._current_frames().values() if _is_backward(top)]
        frame = waiting[0] if len(waiting) == 1 else None
    started = () if frame is None else frame.f_locals["t_outputs"]
    nodes = [each.grad_fn if isinstance(each, Tensor) else each.node for each in started]
    return [node for node in nodes if node is not None]


def _is_backward(frame: FrameType) -> bool:
    return frame.f_code is run_backward.__code__


def view_chain(node: Node, through: Collection[str] = ()) -> Iterator[Node]:
    """Walk from a node through views and casts of one tensor to the operation that computed it.

    Args:
        node: The ``grad_fn`` of a tensor.
        through: Names of further operations to walk through.

    Yields:
        The nodes on the way, starting with `node`.
    """
    while node is not None:
        yield node
        name = type(node).__name__
        if name not in VIEWS and name not in through:
            return
        node = node.next_functions[0][0]


def is_behind(node: Node, target: Node) -> bool:
    """Return whether `target` is `node` or one of the nodes that it was computed from."""
    return any(current is target for current in _walk(node))


def nodes_behind(node: Node) -> set[Node]:
    """Return `node` and all nodes that it was computed from."""
    return set(_walk(node))


def _walk(node: Node) -> Iterator[Node]:
    """Yield `node` and all nodes that it was computed from, each once."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current is not None and current not in seen:
            seen.add(current)
            yield current
            queue.extend(following for following, _ in current.next_functions)


def trains_any(params: Iterable[Tensor]) -> bool:
    """Return whether the running backward pass computes the gradient of any of the parameters.

    ``torch.autograd.grad(score, inputs)`` and ``backward(inputs=...)`` may compute none, although
    they pass through the same outputs. Call this function inside a gradient hook.

    Args:
        params: The parameters.

    Returns:
        False if no parameter gets a gradient. True also if that cannot be known: behind a function
        that starts its own backward pass, such as a reentrant checkpoint, and of sharded ones.
    """
    accumulators = []
    for param in params:  # usually the first one decides
        if is_sharded(param):
            return True
        if param.requires_grad:
            accumulators.append(get_gradient_edge(param).node)
            if _is_executed(accumulators[-1]):
                return True
    current = current_node()
    return bool(accumulators) and not any(is_behind(current, node) for node in accumulators)


def _is_executed(accumulator: Node) -> bool:
    try:
        return is_executed(accumulator)
    except RuntimeError:  # a leaf passed to torch.autograd.grad as an input
        return True


def _has_parameter(node: Node) -> bool:
    if kind_of(node) in _SHIFTS:
        return False
    for following, _ in node.next_functions:
        *_, origin = (None, *view_chain(following))
        variable = getattr(origin, "variable", None)
        if variable is not None and variable.numel() > 1:
            return True
    return False
