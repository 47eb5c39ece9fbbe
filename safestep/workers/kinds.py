"""What every kind of worker offers: ranks of DDP, or micro-batches of one process."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from safestep.workers.dispersion import WorkerSums


@dataclass(frozen=True, slots=True)
class MicroValues:
    """What each rank saw of each of its micro-batches. Float64, NaN where it had fewer.

    Attributes:
        losses: Their losses. Shape ``[M, N]``.
        grad_norms: Norms of their own gradients, if each loss was divided by the number of
            micro-batches before backward; NaN where a rank never sees them. Shape ``[M, N]``.
    """

    losses: Tensor
    grad_norms: Tensor


class Workers(Protocol):
    """Collect the workers' losses and gradients, step by step.

    Attributes:
        num_workers: Number of workers in a step.
        are_ranks: Whether worker i is the same one at every step, so that it can be watched.
        checksums: Of each rank's replica of the parameters, as of the last `sums`; None where there
            are no replicas. Shape ``[N, 2]``.
        micro: Those of each rank's micro-batches, as of the last `sums`; None if each had one.
    """

    num_workers: int
    are_ranks: bool
    checksums: Tensor | None
    micro: MicroValues | None

    def begin_step(self, *, is_measured: bool) -> None:
        """Forget the last step, and prepare the next one."""
        ...

    def add(self, loss: Tensor) -> None:
        """Take one backward's loss and gradient, if this step is measured."""
        ...

    def is_complete(self, is_last: bool | None) -> bool:
        """Return whether the last backward ended the step; the caller may say so."""
        ...

    def sums(self, scale: float, *, with_pairs: bool) -> tuple[Tensor, WorkerSums]:
        """Return the workers' losses ``[N]`` and sums, float64 on the CPU."""
        ...

    def detach(self) -> None:
        """Let go of the model: remove hooks and free copies."""
        ...
