"""Learn what the calls of a module change, and let each run again from where it started."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from safestep._torch import foreach_mul
from safestep.capture.attributes import CONTAINERS, Modes, has_attributes, own_attributes
from safestep.capture.copies import Copier, Look, differing, is_plain, reached
from safestep.capture.written_parameters import Mark, WrittenParameters

# Calls that must have run again without a new effect before only known effects are kept.
_SETTLED = 4
# Steps without a re-run after which the next calls are recorded as if nothing changed: none of them
# may ever run again, where a loss cannot be measured.
_UNSEEN = 16
# Elements of a tensor that is kept before anything is known about it.
_SMALL = 2**16

_ABSENT = object()
# Identity of a module (whose hash may change) and the name of its attribute or buffer, or the
# position of an argument and its type.
Place = tuple[int, Any]


@dataclass(slots=True)
class Start:
    """What a call started from.

    Attributes:
        mark: What the parameters were.
        values: Copies of attributes, buffers and arguments; `_ABSENT` for one that was not there.
        whole: Modules all of whose attributes are in `values`.
        references: Tensors that were not copied, with their version counters and places.
    """

    mark: Mark
    values: dict[Place, Any] = field(default_factory=dict)
    whole: Sequence[nn.Module] = ()
    references: list[tuple[Tensor, int, Place]] = field(default_factory=list)

    def holds(self, place: Place, *, is_deep: bool) -> bool:
        """Return whether a place, and the numbers of tensors in it, are known as they were."""
        if place not in self.values:
            return any(place[0] == id(child) for child in self.whole)  # then it was not there
        return not (is_deep and any(place == each for *_, each in self.references))


class ForwardEffects:
    """Keep what the calls of a module change from before each call.

    The first calls are recorded in full. Each re-run shows what a call changes: attributes, buffers
    and arguments here, parameters in `WrittenParameters`. Once several in a row have shown nothing
    new, only what is known to change is kept: nothing at all for most models. Every re-run is still
    looked at.

    Args:
        module: The root module of the calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = WrittenParameters(module)
        self._known: dict[Place, bool] = {}  # whether numbers of tensors change there as well
        self._copier: Copier | None = None
        self._quiet = 0  # calls that ran again without a new effect, in a row
        self._steps_unseen = 0  # without a re-run, in a row
        self._quiet_modes: Modes | None = None  # in which those ran

    def before(self, leaves: Sequence[Any], modes: Modes) -> Start:
        """Return what a call that is about to run starts from.

        Args:
            leaves: The leaves of its arguments.
            modes: The submodules, and whether each is in train mode.
        """
        is_new = self._quiet < _SETTLED or modes != self._quiet_modes
        is_new &= self._steps_unseen < _UNSEEN
        start = Start(self._parameters.before(is_new=is_new))
        if is_new:
            start.whole = modes[0]
            self._keep(start, _places(modes[0], leaves), is_new=True)
        elif self._known:
            self._keep(start, self._known_places(modes[0], leaves), is_new=False)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and (index, type(leaf)) not in start.values:
                self._refer(start, leaf, (index, type(leaf)))
        return start

    def after(self, start: Start) -> None:
        """Learn which parameters a call has written into.

        Args:
            start: What `before` returned for it.
        """
        self._parameters.after(start.mark)

    def end_step(self) -> None:
        """Count a step whose calls may run again now, or never."""
        self._steps_unseen += 1

    @contextmanager
    def replayed(self, start: Start, leaves: Sequence[Any], modes: Modes) -> Iterator[list[Any]]:
        """Let a call run again inside from where it started.

        To be used within ``without_side_effects``, which puts back what is changed here.

        Args:
            start: What `before` returned for the call.
            leaves: The leaves of its arguments.
            modes: The submodules and their modes, as recorded.

        Yields:
            The leaves of its arguments, as they were.

        Raises:
            RuntimeError: If the call changes something whose state before the call is not known.
        """
        self._steps_unseen = 0
        children = modes[0]
        self._refuse_stale(start, children)
        copier = Copier(self._module)
        fresh = [_argument(copier, start, index, leaf) for index, leaf in enumerate(leaves)]
        _install(start, children, copier)
        places = _places(children, fresh)
        look = Look(places.values(), copier.tree, is_close=self._quiet < _SETTLED)
        with self._parameters.replayed(start.mark):
            yield fresh
        changed = _changed(places, _places(children, fresh), look.changed())
        self._learn(changed, modes)
        news = [place for place in changed if not start.holds(place, is_deep=changed[place])]
        if news:
            raise RuntimeError(
                f"the forward pass changes {self._names(news, children)}, which it was not seen to "
                "do before; its state before each call is kept from now on"
            )

    def _keep(self, start: Start, places: Mapping[Place, Any], *, is_new: bool) -> None:
        place: Place = (-1, None)

        def kept(tensor: Tensor) -> Tensor:
            if self._known.get(place) or (is_new and tensor.numel() <= _SMALL):
                return tensor.detach().clone()
            return self._refer(start, tensor, place)

        if is_new or self._copier is None:
            self._copier = Copier(self._module)
        copier = self._copier.with_tensors(kept)
        numbers = [it for place, it in places.items() if self._known.get(place) and _is_simple(it)]
        if numbers:  # such as running statistics: many small ones, and in every call
            copier.adopt(numbers, foreach_mul(numbers, 1.0))
        for place, value in places.items():
            start.values[place] = copier.copied(value)

    def _refer(self, start: Start, tensor: Tensor, place: Place) -> Tensor:
        tensor = tensor.detach() if tensor.requires_grad else tensor
        if not tensor.is_inference():
            start.references.append((tensor, tensor._version, place))
        return tensor

    def _known_places(
        self, children: Iterable[nn.Module], leaves: Sequence[Any]
    ) -> dict[Place, Any]:
        found: dict[Place, Any] = {}
        by_identity = {id(child): child for child in children}
        for where, name in self._known:
            if where in by_identity:
                found[where, name] = _attribute(by_identity[where], name)
            elif where < len(leaves) and type(leaves[where]) is name:
                found[where, name] = leaves[where]
        return found

    def _refuse_stale(self, start: Start, children: Iterable[nn.Module]) -> None:
        stale = [place for it, version, place in start.references if it._version != version]
        if stale:
            self._known.update(dict.fromkeys(stale, True))
            raise RuntimeError(
                f"{self._names(stale, children)} was changed in place by the forward pass or after "
                "it, and is not known as it was; its state before each call is kept from now on"
            )

    def _learn(self, changed: Mapping[Place, bool], modes: Modes) -> None:
        is_new = any(self._known.get(place, -1) < is_deep for place, is_deep in changed.items())
        for place, is_deep in changed.items():
            self._known[place] = self._known.get(place, False) or is_deep
        is_in_row = not is_new and modes == self._quiet_modes
        self._quiet = self._quiet + 1 if is_in_row else 0
        self._quiet_modes = modes

    def _names(self, places: Iterable[Place], children: Iterable[nn.Module]) -> str:
        paths = {id(child): name for name, child in self._module.named_modules()}
        kinds = {id(child): type(child).__name__ for child in children}
        found = []
        for where, name in places:
            if where in kinds:
                path = paths.get(where, kinds[where])
                found.append(f"{path}.{name}" if path else name)
            else:
                found.append(f"argument {where + 1} of the model ({name.__name__})")
        return ", ".join(dict.fromkeys(found))


def _places(children: Iterable[nn.Module], leaves: Sequence[Any]) -> dict[Place, Any]:
    """Return everything that a call may change, by its place."""
    found: dict[Place, Any] = {}
    for child, own in own_attributes(children):
        held = own | dict(child._buffers)
        found.update({(id(child), name): value for name, value in held.items()})
    found.update(
        {
            (index, type(leaf)): leaf
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, (Tensor, np.ndarray, *CONTAINERS)) or has_attributes(type(leaf))
        }
    )
    return found


def _is_simple(value: Any) -> bool:
    """Return whether `value` is a tensor of numbers that is no view of another one."""
    return is_plain(value) and value.is_floating_point() and value._base is None


def _attribute(child: nn.Module, name: str) -> Any:
    if name in vars(child):
        return vars(child)[name]
    return dict(child._buffers).get(name, _ABSENT)  # the table of a ScriptModule has no get


def _argument(copier: Copier, start: Start, index: int, leaf: Any) -> Any:
    place = index, type(leaf)
    if isinstance(leaf, Tensor) and place not in start.values:
        return leaf.detach() if leaf.requires_grad else leaf
    return copier.copied(start.values.get(place, leaf))


def _install(start: Start, children: Iterable[nn.Module], copier: Copier) -> None:
    by_identity = {id(child): child for child in children}
    for child, own in own_attributes(start.whole):
        for name in own:
            if (id(child), name) not in start.values:
                del vars(child)[name]
    for (where, name), value in start.values.items():
        child = by_identity.get(where)
        if child is None:  # an argument
            continue
        table = child._buffers if name in child._buffers else vars(child)
        if value is not _ABSENT:
            table[name] = copier.copied(value)
        elif table is vars(child):
            table.pop(name, None)


def _changed(
    before: Mapping[Place, Any], after: Mapping[Place, Any], objects: Mapping[int, bool]
) -> dict[Place, bool]:
    """Return the places that changed, and whether the numbers of tensors did."""
    changed = dict.fromkeys(differing(before, after), False)
    for place, value in before.items() if objects else ():
        if found := reached(value, objects):
            changed[place] = any(objects[each] for each in found)
    return changed
