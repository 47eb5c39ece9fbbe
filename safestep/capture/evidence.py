"""Keep what gradients show about the outputs of a call, until the call runs again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safestep.capture.gradient import GradientEvidence, first_rows
from safestep.capture.loss_graph import Use, use_of_output
from safestep.capture.output_gradients import ROOM

if TYPE_CHECKING:
    from safestep.capture.call import Call

# Elements of a gradient that is cheaper to keep than to look at.
SMALL = 2**16
# Gradients of one output that are kept before they are read: one for each of many tasks, say.
_MANY = 16


@dataclass(frozen=True, slots=True)
class OutputValues:
    """An output as the model returned it, with the version that shows a change in place."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, output: Tensor) -> OutputValues:
        """Return the values of an output, without a copy."""
        return cls(output.detach(), output._version)

    @property
    def is_changed(self) -> bool:
        """Whether the output was changed in place since."""
        return self.tensor._version != self.version


class EvidenceKeeper:
    """Keep the gradients of outputs, and remember what earlier ones showed.

    Attributes:
        room: Elements of large gradients that may still be kept whole before the next step.
    """

    def __init__(self) -> None:
        self.room: float = ROOM
        self._class_axes: dict[str, int] = {}
        self._settled: set[str] = set()
        self._masked: set[str] = set()  # names of outputs of which single classes have no gradient
        self._changed: set[str] = set()  # names of outputs that were seen to change in place
        self._volatile: set[str] = set()  # those whose gradient changed in place

    def settle(self, names: Iterable[str]) -> None:
        """Stop reading the graph of the loss for outputs whose gradient shows their form.

        Args:
            names: Names of these outputs.
        """
        self._settled = set(names)

    def forget(self) -> None:
        """Forget class axes and settled outputs, because the loss has changed."""
        self._settled.clear()
        self._class_axes.clear()

    def values(self, name: str, output: Tensor) -> OutputValues | None:
        """Return the output if it is needed with its gradient: until its class axis is known."""
        return None if name in self._class_axes else OutputValues.of(output)

    def keep(
        self, call: Call, name: str, gradient: Tensor, values: OutputValues | None, place: int = 0
    ) -> Tensor:
        """Keep what one backward pass shows about an output.

        Args:
            call: The call that returned the output.
            name: Name of the output.
            gradient: Gradient of the loss with respect to it, detached.
            values: The output, if it is needed.
            place: ``output_nr`` of the output.

        Returns:
            A copy of a small gradient, which is read when the call runs again. A large gradient is
            not copied. It is read at once, or later if it is kept and its class axis is known.
        """
        if not gradient.numel():
            call.empty.append(name)
            return gradient
        unread = call.unread.setdefault(name, [])
        if not is_readable(gradient):
            unread.append(_nothing)
            call.kept.missing.add(name)
            return gradient
        is_looked_up = gradient.numel() > 1 and name not in self._settled
        use = use_of_output(place) if is_looked_up else None
        is_changed = values is not None and values.is_changed
        if is_changed:
            self._changed.add(name)
        output = None if values is None or is_changed else values.tensor
        if gradient.numel() > SMALL:
            axis = self._class_axes.get(name)
            # Once the axis is known, a look for masked classes would wait for the device.
            has_zeros = None if axis is None else name in self._masked
            if None in call.losses:
                call.samples[name] = first_rows(gradient).clone()
            is_kept = self._keep_whole(call, name, gradient)
            if is_kept and axis is not None and name not in self._volatile:
                version = gradient._version
                unread.append(partial(self._read_later, name, gradient, version, has_zeros, use))
                return gradient
            evidence = self._read(name, gradient, output, has_zeros, use)
            unread.append(lambda: evidence)
            return gradient
        gradient = call.samples[name] = gradient.clone()
        call.kept.add(name, gradient)
        output = None if output is None else output.clone()
        unread.append(partial(self._read, name, gradient, output, use=use))
        if len(unread) >= _MANY:
            call.read_gradients()
        return gradient

    def _keep_whole(self, call: Call, name: str, gradient: Tensor) -> bool:
        if gradient.numel() > self.room:
            call.kept.missing.add(name)
            return False
        self.room -= gradient.numel()
        call.kept.add(name, gradient)
        return True

    def _read_later(
        self,
        name: str,
        gradient: Tensor,
        version: int,
        has_zeros: bool | None,
        use: Use | None,
    ) -> GradientEvidence:
        # Most steps are predicted and never need the evidence.
        if gradient._version == version:
            return self._read(name, gradient, None, has_zeros, use)
        self._volatile.add(name)
        raise RuntimeError(
            f"the loss's gradient at {name} was changed in place; from the next step on it is read "
            "before it can change"
        )

    def _read(
        self,
        name: str,
        gradient: Tensor,
        output: Tensor | None,
        has_zeros: bool | None = None,
        use: Use | None = None,
    ) -> GradientEvidence:
        evidence = GradientEvidence.of(
            gradient, self._class_axes.get(name), output,
            is_changed=name in self._changed, has_zeros=has_zeros, use=use,
        )  # fmt: skip
        if evidence.class_axis is not None:
            self._class_axes[name] = evidence.class_axis
        if evidence.zeros is not None:
            self._masked.add(name)
        return evidence


def _nothing() -> GradientEvidence:
    unknown = torch.tensor([torch.nan])
    return GradientEvidence(None, unknown.ne(0), None, unknown)


def is_readable(tensor: Tensor) -> bool:
    """Return whether a tensor holds plain real numbers: not sparse, nested or complex ones."""
    return tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested
