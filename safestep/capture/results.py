"""Keep what a call returned, to tell whether it returns the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor

from safestep.capture.evidence import SMALL, OutputValues
from safestep.capture.outputs import named_tensors

# Other kernels, as a second run without compilation takes, differ by less: share of the largest.
_ROUNDING, _ROUNDING_HALF = 1e-3, 5e-2


class Sameness(IntEnum):
    """How alike two results are, from the best to the worst."""

    SAME = 0
    ROUNDED = 1
    UNKNOWN = 2
    OTHER = 3


@dataclass(frozen=True, slots=True)
class OutputResult:
    """One output of a call: all of it where that is small, else its smallest and largest number.

    Attributes:
        values: The output itself, not a copy; None for a large one.
        ends: Its smallest and largest number; empty where they were not read.
    """

    values: OutputValues | None
    ends: Sequence[Tensor]

    @classmethod
    def of(cls, output: Tensor, ends: Sequence[Tensor]) -> OutputResult:
        """Return what is kept of an output.

        Args:
            output: The output.
            ends: Its smallest and largest number, where they are known already.
        """
        is_small = output.numel() <= SMALL
        return cls(OutputValues.of(output) if is_small else None, ends)

    def compare(self, again: Tensor) -> Sameness:
        """Return how alike the output of a second run is."""
        if self.values is not None and not self.values.is_changed:
            return compare([self.values.tensor], [again])
        if not self.ends:
            return Sameness.UNKNOWN
        return compare(self.ends, again.aminmax() if again.numel() else self.ends)


def compare_outputs(kept: Mapping[str, OutputResult], output: Any) -> Sameness:
    """Return how alike the outputs of a second run of a call are.

    Args:
        kept: What was kept of the first run's outputs, by name.
        output: What the second run returned.

    Returns:
        The worst over the outputs.
    """
    again = dict(named_tensors(output))
    if not kept or not kept.keys() <= again.keys():
        return Sameness.UNKNOWN if not kept else Sameness.OTHER
    return max(result.compare(again[name].detach()) for name, result in kept.items())


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> Sameness:
    """Return how alike two lists of tensors are.

    Args:
        first: The tensors of the first run.
        second: Those of the second.

    Returns:
        OTHER where they differ by more than rounding, or in what is not finite.

    Example:
        >>> import torch
        >>> compare([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.000001])]).name
        'ROUNDED'
    """
    if any(one.shape != two.shape for one, two in zip(first, second, strict=True)):
        return Sameness.OTHER
    return max(
        (_compare(one, two.to(one.device)) for one, two in zip(first, second, strict=True)),
        default=Sameness.SAME,
    )


def _compare(one: Tensor, two: Tensor) -> Sameness:
    if bool(((one == two) | (one.isnan() & two.isnan())).all()):
        return Sameness.SAME
    if not one.is_floating_point() or bool((one.isfinite() != two.isfinite()).any()):
        return Sameness.OTHER
    is_half = one.dtype.itemsize < 4 or two.dtype.itemsize < 4
    wide, other = one.double(), two.double()
    size = wide[wide.isfinite()].abs().amax()
    off = (wide - other)[wide.isfinite()].abs().amax()
    is_rounded = bool(off <= (_ROUNDING_HALF if is_half else _ROUNDING) * size)
    return Sameness.ROUNDED if is_rounded else Sameness.OTHER


def loss_of(output: Any) -> Tensor | None:
    """Return the loss that a recorded function returned.

    Args:
        output: A loss, or a mapping with one in "loss".

    Returns:
        The first number; None if there is none.
    """
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    tensors = (each.detach() for _, each in named_tensors(loss) if each.numel() == 1)
    return next((each.reshape(()) for each in tensors), None)
