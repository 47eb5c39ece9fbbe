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
class _Way:
    node: Node
    change: str = ""
    is_cut: bool = False
    is_turned: bool = False


def _use(output: Node, readers: Mapping[Node, list[Node]], roots: Collection[Node]) -> Use:
    softmaxes, changes, ends, combined = set(), set(), set(), set()
    has_sigmoid = is_cut = is_used_otherwise = False
    for way in _ways(output, readers):
        kind = kind_of(way.node)
        combined |= {_COMBINING[kind]} if kind in _COMBINING else set()
        is_end = kind in _SOFTMAXES or kind in _SIGMOIDS
        is_used_otherwise |= way.node in roots and not is_end and way.change != _NESTED
        if not is_end:
            continue
        ends.add(way.node)
        is_cut |= way.is_cut
        is_odd = way.change == _CHANGES["Neg"] and kind in _SIGMOIDS
        if (way.change and not is_odd) or (kind == "Softplus" and way.node._saved_beta != 1):
            changes.add(way.change or _CHANGES["Mul"])
        elif kind in _SIGMOIDS:
            has_sigmoid = True
        else:
            softmaxes |= set(_softmaxes_of(way))
    is_split = is_cut and (is_used_otherwise or (has_sigmoid and bool(softmaxes)))
    hidden, is_mixed = (), False
    if may_hide(readers):
        hidden, is_mixed = tuple(hidden_parts(roots, ends)), mixes_rows(roots, {*ends, output})
    return Use(
        frozenset(softmaxes), has_sigmoid, frozenset(changes), is_split, frozenset(combined),
        hidden, is_mixed,
    )  # fmt: skip


def _ways(output: Node, readers: Mapping[Node, list[Node]]) -> Iterator[_Way]:
    """Walk every path from an output towards the loss."""
    queue, seen = [_Way(node) for node in readers[output]], set()
    while queue:
        way = queue.pop()
        if way in seen:
            continue
        seen.add(way)
        yield way
        beyond = _beyond(way, kind_of(way.node))
        queue += [replace(beyond, node=reader) for reader in readers[way.node]]


def _beyond(way: _Way, kind: str) -> _Way:
    if kind in _SOFTMAXES or kind in _SIGMOIDS:
        return replace(way, change=_NESTED)
    if kind in _TURNS:
        return replace(way, is_turned=True)
    if kind in _CUTS or kind in {"Select", "Slice"}:
        return replace(way, is_cut=True)
    if type(way.node).__name__ in VIEWS or kind == "_DDPSink" or way.change not in {"", _SHIFT}:
        return way
    if kind in _SHIFTS and sum(each is not None for each, _ in way.node.next_functions) == 1:
        return replace(way, change=_SHIFT)
    return replace(way, change=_CHANGES.get(kind, kind.lower()))


_CHANGES = {"Div": "a division", "Mul": "a product", "Neg": "a change of sign"}


def _softmaxes_of(way: _Way) -> Iterator[SoftmaxOf]:
    argument, index = way.node.next_functions[0]  # logsumexp's result lacks the axis
    shape = tuple(argument._input_metadata[index].shape)
    dims = way.node._saved_dim
    dims = dims if isinstance(dims, tuple) else (dims,)
    for dim in dims:
        axis = signed(dim) % len(shape)
        yield SoftmaxOf(axis, len(shape) - axis, shape[axis], way.is_turned)
