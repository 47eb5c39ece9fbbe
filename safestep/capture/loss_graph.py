"""Read from the autograd graph, while a backward pass runs, how the loss uses a model's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from safestep._torch import current_node
from safestep.capture.autograd_graph import (
    VIEWS,
    Node,
    kind_of,
    loss_side,
    roots_of_backward,
    signed,
)
from safestep.capture.hidden import hidden_parts, may_hide, mixes_rows

_SOFTMAXES = frozenset({"Softmax", "LogSoftmax", "Logsumexp", "Logcumsumexp"})
_SIGMOIDS = frozenset(
    {"Sigmoid", "LogSigmoid", "Softplus", "BinaryCrossEntropyWithLogits", "SoftMarginLoss"}
)
# Operations that select rows or elements and change no value.
_CUTS = frozenset({"Gather", "Index", "IndexSelect", "MaskedSelect", "Split", "Take", "Unbind"})
_TURNS = frozenset({"Permute", "Transpose", "T"})
# Operations that may add constants to logits or mask some: the radius may stay the same.
_SHIFTS = frozenset(
    {"Add", "Cat", "ConstantPadNd", "CopySlices", "IndexPut", "MaskedFill", "Stack", "Sub", "Where"}
)  # fmt: skip
_COMBINING = {"CtcLoss": "ctc_loss"}
_SHIFT, _NESTED = "an addition", "another softmax or sigmoid"
_MOST_NODES = 4096  # a loss with more is not read: it would take too long


class SoftmaxOf(NamedTuple):
    """A softmax of an output: its axis, counted from both ends, and its length."""

    axis: int
    from_end: int
    length: int
    is_turned: bool  # axes were exchanged before it


@dataclass(frozen=True, slots=True)
class Use:
    """How a loss uses an output of a model.

    Attributes:
        softmaxes: Softmaxes of the output itself.
        has_sigmoid: Whether there is a sigmoid of the output itself.
        changes: Operations that change the output before further softmaxes or sigmoids.
        is_split: Whether parts of the output are used in different ways.
        combined: Functions behind the output that sum over combinations of classes.
        hidden: Parts of the loss whose logits are not seen; see ``hidden_parts``.
        is_mixed: Whether a sum over rows is divided by, or its logarithm taken; see ``mixes_rows``.
    """

    softmaxes: frozenset[SoftmaxOf]
    has_sigmoid: bool
    changes: frozenset[str]
    is_split: bool
    combined: frozenset[str]
    hidden: tuple[str, ...]
    is_mixed: bool

    @property
    def ways(self) -> tuple[object, ...]:
        """What stays the same as long as the loss does, whatever the number of classes."""
        axes = frozenset((each.axis, each.from_end) for each in self.softmaxes)
        return axes, self.has_sigmoid, self.changes, self.is_split

    @property
    def is_harmless(self) -> bool:
        """Whether the output enters no softmax or sigmoid, so that no radius depends on it."""
        return not (self.softmaxes or self.has_sigmoid or self.changes or self.hidden)

    @property
    def is_shifted(self) -> bool:
        """Whether additions or masks are all that changes the output before a softmax."""
        return self.changes == {_SHIFT}

    def joined(self, other: Use) -> Use:
        """Return the use by the losses of two backward passes together."""
        return Use(
            self.softmaxes | other.softmaxes,
            self.has_sigmoid or other.has_sigmoid,
            self.changes | other.changes,
            self.is_split or other.is_split,
            self.combined | other.combined,
            tuple(dict.fromkeys((*self.hidden, *other.hidden))),
            self.is_mixed or other.is_mixed,
        )

    def class_axis(self, shape: tuple[int, ...], zero_sum_axis: int | None) -> int | None:
        """Return the axis of the output that all softmaxes run over.

        Args:
            shape: Shape of the output.
            zero_sum_axis: The axis over which the gradient sums to zero, None if there is none.

        Returns:
            None if there is no softmax, or not one axis for all.
        """
        found = {_axis(each, shape, zero_sum_axis) for each in self.softmaxes}
        return found.pop() if len(found) == 1 else None


def _axis(softmax: SoftmaxOf, shape: tuple[int, ...], zero_sum_axis: int | None) -> int | None:
    if zero_sum_axis is not None:
        return zero_sum_axis if shape[zero_sum_axis] == softmax.length else None
    places = (softmax.axis, len(shape) - softmax.from_end)
    fitting = {at for at in places if 0 <= at < len(shape) and shape[at] == softmax.length}
    return fitting.pop() if len(fitting) == 1 and not softmax.is_turned else None


def use_of_output(place: int) -> Use | None:
    """Return how the loss uses an output; call it inside a hook on the output's gradient.

    Args:
        place: ``output_nr`` of the output.

    Returns:
        The use; None if the graph does not show it, as when C++ began the backward pass.
    """
    try:
        return _use_of_output(place)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        return None  # this version of torch builds a node in another way


def _use_of_output(place: int) -> Use | None:
    output = current_node()
    roots = roots_of_backward()
    side = loss_side(roots, {output}, at_most=_MOST_NODES) if output is not None else set()
    if output not in side:
        return None
    readers: dict[Node, list[Node]] = defaultdict(list, {root: [] for root in roots})
    for node in side - {output}:
        for following, index in node.next_functions:
            if following is not None and (following is not output or index == place):
                readers[following].append(node)
    return _use(output, readers, roots)


@dataclass(frozen=True, slots=True)
class _Path:
    """A path from an output to a node of the loss's graph, and what lies on it before the node."""

    node: Node
    kind: str
    change: str = ""
    is_cut: bool = False
    is_turned: bool = False

    @property
    def is_end(self) -> bool:
        return self.kind in _SOFTMAXES or self.kind in _SIGMOIDS

    @property
    def change_before_end(self) -> str:
        """What changes the output before the softmax or sigmoid at which the path ends."""
        is_scaled = self.kind == "Softplus" and self.node._saved_beta != 1
        is_mirrored = self.kind in _SIGMOIDS and self.change == _CHANGES["Neg"]
        if is_mirrored and not is_scaled:
            return ""  # sigmoid(-x) = 1 - sigmoid(x)
        return self.change or (_CHANGES["Mul"] if is_scaled else "")


def _use(output: Node, readers: Mapping[Node, list[Node]], roots: Collection[Node]) -> Use:
    paths = list(_paths(output, readers))
    ends = [path for path in paths if path.is_end]
    changes = {path.change_before_end for path in ends} - {""}
    direct = [path for path in ends if not path.change_before_end]
    softmaxes = {it for path in direct if path.kind in _SOFTMAXES for it in _softmaxes_of(path)}
    has_sigmoid = any(path.kind in _SIGMOIDS for path in direct)
    others = [path for path in paths if path.node in roots and not path.is_end]
    is_used_otherwise = any(path.change != _NESTED for path in others)
    is_cut = any(path.is_cut for path in ends)
    hidden, is_mixed = (), False
    if may_hide(readers):
        at_ends = {path.node for path in ends}
        hidden = tuple(hidden_parts(roots, at_ends))
        is_mixed = mixes_rows(roots, at_ends | {output})
    return Use(
        frozenset(softmaxes), has_sigmoid, frozenset(changes),
        is_cut and (is_used_otherwise or (has_sigmoid and bool(softmaxes))),
        frozenset(_COMBINING[path.kind] for path in paths if path.kind in _COMBINING),
        hidden, is_mixed,
    )  # fmt: skip


def _paths(output: Node, readers: Mapping[Node, list[Node]]) -> Iterator[_Path]:
    """Walk every path from an output towards the loss."""
    queue, seen = [_Path(node, kind_of(node)) for node in readers[output]], set()
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        beyond = _beyond(path)
        queue += [replace(beyond, node=node, kind=kind_of(node)) for node in readers[path.node]]


def _beyond(path: _Path) -> _Path:
    """Return the path with what its node does to the output."""
    node, kind = path.node, path.kind
    if path.is_end:
        return replace(path, change=_NESTED)
    if kind in _TURNS:
        return replace(path, is_turned=True)
    if kind in _CUTS or kind in {"Select", "Slice"}:
        return replace(path, is_cut=True)
    if type(node).__name__ in VIEWS or kind == "_DDPSink" or path.change not in {"", _SHIFT}:
        return path
    if kind in _SHIFTS and sum(each is not None for each, _ in node.next_functions) == 1:
        return replace(path, change=_SHIFT)
    return replace(path, change=_CHANGES.get(kind, kind.lower()))


_CHANGES = {"Div": "a division", "Mul": "a product", "Neg": "a change of sign"}


def _softmaxes_of(path: _Path) -> Iterator[SoftmaxOf]:
    argument, index = path.node.next_functions[0]  # logsumexp's result lacks the axis
    shape = tuple(argument._input_metadata[index].shape)
    dims = path.node._saved_dim
    dims = dims if isinstance(dims, tuple) else (dims,)
    for dim in dims:
        axis = signed(dim) % len(shape)
        yield SoftmaxOf(axis, len(shape) - axis, shape[axis], path.is_turned)
