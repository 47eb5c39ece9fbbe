"""Norms of an update, of its gradient and of signals; whether they are finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf

import torch
from torch import Tensor

from safestep.measure.update import Finding, Update
from safestep.parallel.checksum import sum_of_words
from safestep.parallel.norms import each_norm, joint_norm
from safestep.parallel.shards import local, local_parts


@dataclass(frozen=True, slots=True)
class Health:
    """Sizes of one update on this worker, as numbers of the host.

    Attributes:
        step_norm: 2-norm of the update, of this worker's shard where parameters are sharded.
        gradient_norm: That of the gradient.
        signals: Sizes that tell unusual data from usual; see ``Call.signals``.
        fingerprint: A number that replicas which make the same update have in common, and which
            differs if their updates differ in bits that the norm does not show. 0 without `prints`.
    """

    step_norm: float
    gradient_norm: float
    signals: tuple[float, ...] = ()
    fingerprint: float = 0.0

    @classmethod
    def of(cls, update: Update, *, watches: bool, prints: bool = False) -> Health:
        """Return the sizes, with the one wait for the device that a predicted step has.

        Args:
            update: The update.
            watches: Whether the signals of its calls are wanted too.
            prints: Whether the fingerprint is wanted too.

        Returns:
            The sizes.
        """
        moves = update.parts()
        gradients = [g for param in update.params if (g := param.grad) is not None]
        if update.is_sharded:
            gradients = local_parts(gradients)
        signals = local_parts(s for call in update.calls for s in call.signals) if watches else []
        sizes = [signal for signal in signals if not signal.ndim]  # whose norm is their size
        norms = each_norm([*moves, *gradients, *(signal for signal in signals if signal.ndim)])
        words = [sum_of_words(move).double() for move in moves if move.ndim] if prints else []
        numbers = _read([*norms, *sizes, *words])
        first, last = len(moves), len(moves) + len(gradients)
        end = len(norms) + len(sizes)
        # In the order of the calls' single numbers, then of what was reduced here.
        signals_read = (*numbers[len(norms) : end], *numbers[last : len(norms)])
        # Exact in float64, and the same in every process: hashes of numbers are not salted.
        bits = hash((*numbers[:first], *numbers[end:])) % 2**52 if prints else 0
        return cls(
            hypot(*numbers[:first]), hypot(*numbers[first:last]), tuple(map(abs, signals_read)),
            float(bits),
        )  # fmt: skip

    def finding(self, radius: float, reason: str | None) -> Finding:
        """Return the outcome of a measurement of this update.

        Args:
            radius: The radius that was measured, NaN if none was.
            reason: What stood in the way, else None.

        Returns:
            The gravest that holds.
        """
        if not self.gradient_norm < inf:
            return Finding.GRADIENT_NOT_FINITE
        if not self.step_norm < inf:
            return Finding.UPDATE_NOT_FINITE
        if reason is not None:
            return Finding.UNMEASURED
        return Finding.MEASURED if radius == radius else Finding.MEASUREMENT_NOT_FINITE


def where_not_finite(finding: Finding, update: Update, names: Mapping[Tensor, str]) -> str:
    """Return the reason of a step that is not finite, with the parameter where that begins.

    Args:
        finding: That the gradient, the update or the measurement is not finite.
        update: The update.
        names: Names of the parameters.

    Returns:
        For instance ``"the gradient is not finite: head.weight"``.
    """
    if finding is Finding.MEASUREMENT_NOT_FINITE:
        return str(finding)
    is_gradient = finding is Finding.GRADIENT_NOT_FINITE
    tensors = [p.grad for p in update.params] if is_gradient else update.change
    return f"{finding}: {_first_not_finite(update.params, tensors, names)}"


def _first_not_finite(
    params: Sequence[Tensor], tensors: Sequence[Tensor | None], names: Mapping[Tensor, str]
) -> str:
    for param, tensor in zip(params, tensors, strict=True):
        if tensor is not None and not joint_norm([local(tensor)]).isfinite():
            return names.get(param, "a parameter outside the model")
    return "its norm overflows"


def _read(scalars: Sequence[Tensor]) -> list[float]:
    if not scalars or scalars[0].is_cpu:  # nothing to wait for
        return [scalar.item() for scalar in scalars]
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()
