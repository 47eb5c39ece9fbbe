"""Keep the loss's gradient at the outputs of a call, to audit that of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from torch import Tensor

from safestep.capture.autograd_graph import Node, nodes_behind

# Elements of larger gradients that are kept until the step, of all calls: 16 MiB in float32.
ROOM = 2**22
_version = attrgetter("_version")


@dataclass(slots=True)
class OutputGradients:
    """The loss's gradient at the outputs of one call, summed over backward passes.

    Attributes:
        sums: The gradients by output name.
        missing: Outputs whose gradient was too large to keep, or is sparse or complex.
        inside: By output name, other outputs that were computed from it.
        others: Parameters that the optimizer does not hold.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    inside: dict[str, frozenset[str]] = field(default_factory=dict)
    others: Sequence[Tensor] = ()
    _versions: dict[str, int] = field(default_factory=dict)
    _places: list[int] = field(default_factory=list)

    def begin(self, others: Sequence[Tensor]) -> None:
        """Note where parameters that another optimizer may move are in the backward pass.

        Args:
            others: Parameters that the guarded optimizer does not hold.
        """
        self.others, self._places = others, list(map(_version, others))

    def have_moved(self, own: Collection[Tensor]) -> bool:
        """Return whether another optimizer has moved a parameter since.

        Args:
            own: Parameters that the guarded optimizer moves.
        """
        pairs = zip(self.others, self._places, strict=True)
        return any(param._version != place for param, place in pairs if param not in own)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add what came back in one backward pass.

        Args:
            name: Name of the output.
            gradient: The gradient, not copied.
        """
        known = self.sums.get(name)
        total = gradient if known is None else known + gradient
        self.sums[name], self._versions[name] = total, total._version

    def ends(self) -> tuple[dict[str, Tensor], str | None]:
        """Return the gradients at the outputs that no other output with a gradient came from.

        The gradient at logits from which the model computed its loss belongs to that loss.

        Returns:
            The gradients by name, and why one of them is not known, else None.
        """
        names = self.sums.keys() | self.missing
        ends = {name for name in names if names.isdisjoint(self.inside.get(name, ()))}
        for name in ends & self.missing:
            return {}, f"the loss's gradient at {name} was not kept (`audit_interval` keeps it)"
        for name in ends:
            if self.sums[name]._version != self._versions[name]:
                return {}, f"the loss's gradient at {name} was changed in place"
        return {name: self.sums[name] for name in ends}, None


class OutputOrder:
    """Remember which outputs of a model are computed from which others."""

    def __init__(self) -> None:
        self._inside: dict[tuple[str, ...], dict[str, frozenset[str]]] = {}

    def of(self, outputs: Sequence[tuple[str, Tensor]]) -> dict[str, frozenset[str]]:
        """Return, by name, the other outputs that were computed from an output.

        The graph is searched once for each set of names.

        Args:
            outputs: Names and tensors with a graph.

        Returns:
            The names.
        """
        if len(outputs) < 2:
            return {}
        key = tuple(name for name, _ in outputs)
        if key not in self._inside:
            behind = [nodes_behind(tensor.grad_fn) for _, tensor in outputs]
            self._inside[key] = {
                name: frozenset(
                    other
                    for place, (other, later) in enumerate(outputs)
                    if _comes_from((place, later, behind[place]), (index, tensor))
                )
                for index, (name, tensor) in enumerate(outputs)
            }
        return self._inside[key]


def _comes_from(later: tuple[int, Tensor, set[Node]], earlier: tuple[int, Tensor]) -> bool:
    """Return whether one output was computed from another; of two names of one, the second is."""
    place, tensor, behind = later
    index, other = earlier
    if tensor.grad_fn is other.grad_fn:
        return tensor.output_nr == other.output_nr and place > index
    return other.grad_fn in behind
