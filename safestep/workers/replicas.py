"""Which replica differs? Numbers that data-parallel replicas must have in common, compared."""

from __future__ import annotations

from math import nan

from torch import Tensor

from safestep.workers.drift import WorkerEvent


class ReplicaWatch:
    """Tell when numbers that are equal on all replicas no longer are, and on which rank.

    Replicas apply the same update to the same weights, so their update norms and checksums are
    equal to the last bit. They differ from the step on at which one replica's weights or optimizer
    state do. Each rank is named once.

    Args:
        quantity: What is compared, for the message.
        is_trusted: Whether the ranks are known to be replicas. If not, they are watched once their
            numbers have been equal: ranks that train models of their own are then never accused.
        has_size: Whether the first number is a size, whose difference the message tells.

    Example:
        >>> import torch
        >>> watch = ReplicaWatch("update norm", is_trusted=True, has_size=True)
        >>> rows = torch.tensor([[0.5], [0.5], [0.25], [0.5]], dtype=torch.float64)
        >>> watch.update(7, rows).message
        'rank 2: update norm differs from the other replicas since step 7 (by 50 %)'
    """

    def __init__(self, quantity: str, *, is_trusted: bool, has_size: bool = False) -> None:
        self._quantity, self._has_size = quantity, has_size
        self._is_armed = is_trusted
        self._named: set[int] = set()

    def update(self, step: int, rows: Tensor) -> WorkerEvent | None:
        """Compare one step's numbers.

        Args:
            step: The step's number.
            rows: Each rank's numbers, on the CPU; a rank with infinite ones does not take part.
                Shape ``[N, K]``.

        Returns:
            An event if a rank differs that did not before, else None.
        """
        if bool((rows == rows[0]).all()):
            self._is_armed = True
            return None
        present = (~rows.isinf().any(1)).nonzero().flatten()
        if not self._is_armed or rows[present].isnan().any():  # what is not a number equals nothing
            return None
        odd = odd_ones(rows[present])
        named = present[odd].tolist()
        if self._named.issuperset(named):
            return None
        self._named.update(named)
        sizes = rows[present, 0]
        difference = float((sizes.amax() - sizes.amin()) / sizes.amax()) if self._has_size else nan
        message = self._message(step, named, len(present), difference)
        return WorkerEvent(step, named[0], self._quantity, difference, step, message)

    def _message(self, step: int, named: list[int], count: int, difference: float) -> str:
        amount = f" (by {100 * difference:.2g} %)" if difference > 0 else ""
        amount = amount or (" (in the last bits)" if self._has_size else "")
        ranks = " and ".join(map(str, named)) if len(named) < 9 else f"{named[0]} and others"
        if len(named) == count:
            return (
                f"ranks {ranks}: the replicas differ in the {self._quantity} since step {step}"
                f"{amount}; which one is off cannot be told"
            )
        noun, verb = ("rank", "differs") if len(named) == 1 else ("ranks", "differ")
        return (
            f"{noun} {ranks}: {self._quantity} {verb} from the other replicas "
            f"since step {step}{amount}"
        )


def odd_ones(rows: Tensor) -> list[int]:
    """Return the rows that differ from the most frequent one; all rows if no row is most frequent.

    Args:
        rows: Numbers to compare. Shape ``[N, K]``.

    Returns:
        Indices of rows, none if all are equal.

    Example:
        >>> import torch
        >>> odd_ones(torch.tensor([[1.0], [2.0], [1.0]])), odd_ones(torch.tensor([[1.0], [2.0]]))
        ([1], [0, 1])
    """
    _, kinds, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return []
    most = counts.max()
    if int((counts == most).sum()) > 1:
        return list(range(len(rows)))
    return (kinds != counts.argmax()).nonzero().flatten().tolist()
