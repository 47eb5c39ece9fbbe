"""Which replica differs? Numbers that data-parallel replicas must have in common, compared."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
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

    def update(self, step: int, rows: Tensor, shards: Tensor | None = None) -> WorkerEvent | None:
        """Compare one step's numbers.

        Args:
            step: The step's number.
            rows: Each rank's numbers, on the CPU; a rank with infinite ones does not take part.
                Shape ``[N, K]``.
            shards: Which shard each rank holds, where they do not all hold the same: only those of
                one shard are replicas. Shape ``[N]``.

        Returns:
            An event if a rank differs that did not before, else None.
        """
        first = rows[0] if shards is None else rows[_first_holders(shards)]
        differs = (rows != first).any(1)
        if not differs.any():
            # That no update moves tells nothing of the ranks.
            self._is_armed |= not self._has_size or bool(rows[:, 0].any())
            return None
        if not self._is_armed:
            return None
        shards = rows.new_zeros(len(rows)) if shards is None else shards
        odd = [_Odd.of(rows, shards == shard) for shard in shards[differs].unique()]
        return self._event(step, [each for each in odd if not self._named.issuperset(each.ranks)])

    def _event(self, step: int, odd: list[_Odd]) -> WorkerEvent | None:
        # Of ranks that a majority is against; of those that none tells apart, at the next step.
        odd = [each for each in odd if each.is_told] or odd
        if not odd:
            return None
        named = sorted(rank for each in odd for rank in each.ranks)
        self._named.update(named)
        difference = max(each.difference for each in odd) if self._has_size else nan
        message = self._message(step, named, difference, is_told=odd[0].is_told)
        return WorkerEvent(step, named[0], self._quantity, difference, step, message)

    def _message(self, step: int, named: list[int], difference: float, *, is_told: bool) -> str:
        amount = f" (by {100 * difference:.2g} %)" if difference > 0 else ""
        amount = amount or (" (in the last bits)" if self._has_size else "")
        ranks = " and ".join(map(str, named)) if len(named) < 9 else f"{named[0]} and others"
        if not is_told:
            return (
                f"ranks {ranks}: the replicas differ in the {self._quantity} since step {step}"
                f"{amount}; which one is off cannot be told"
            )
        noun, verb = ("rank", "differs") if len(named) == 1 else ("ranks", "differ")
        return (
            f"{noun} {ranks}: {self._quantity} {verb} from the other replicas "
            f"since step {step}{amount}"
        )


@dataclass(frozen=True, slots=True)
class _Odd:
    """The ranks that differ among those that hold one shard."""

    ranks: list[int]
    is_told: bool  # whether a majority tells which they are
    difference: float  # largest relative difference of their first numbers

    @classmethod
    def of(cls, rows: Tensor, holds: Tensor) -> _Odd:
        holders = (holds & ~rows.isinf().any(1)).nonzero().flatten()
        held = rows[holders]
        if held.isnan().any():  # what is not a number equals nothing
            return cls([], True, nan)
        odd, sizes = odd_ones(held), held[:, 0]
        difference = float((sizes.amax() - sizes.amin()) / sizes.amax()) if odd else 0.0
        return cls(holders[odd].tolist(), len(odd) < len(held), difference)


def _first_holders(shards: Tensor) -> Tensor:
    """Return for each rank the first that holds the same shard."""
    _, places = shards.unique(return_inverse=True)
    ranks = torch.arange(len(shards))
    first = torch.full_like(places, len(shards)).scatter_reduce(0, places, ranks, "amin")
    return first[places]


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
