"""Gather numbers from the ranks that still have data, where the others have run out of theirs."""

from __future__ import annotations

from math import inf
from struct import pack, unpack
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from safestep.parallel.collectives import group_timeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

ABSENT = -inf  # every number of a rank that has no more data


class PresentRanks:
    """The ranks that have not run out of data, and what they tell each other.

    Within ``ddp.join()`` a rank without data answers torch's collectives and nobody else's. So the
    numbers go through the key-value store of the group, which waits for no rank that is absent, and
    nothing is left waiting where an optimizer's step is left out, as GradScaler does.

    Args:
        group: The ranks.
        name: A new one for each context, the same on every rank: keys of an earlier one, or of a
            process that was killed, may still be there.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self._store = dist.PrefixStore(f"safestep/{name}", group.get_group_store())
        self._timeout = group_timeout(group)
        self._size, self._index = dist.get_world_size(group), dist.get_rank(group)
        self._absent: set[int] = set()
        self._rounds = 0  # the same number on all present ranks
        self.is_absent = False

    def leave(self) -> None:
        """Be absent from now on. Call it before the collective that the others then wait for."""
        if not self.is_absent:
            self.is_absent = True
            self._store.set(f"absent/{self._index}", "")
            self._store.add("absent", 1)

    def close(self) -> None:
        """Leave no key behind. Call it when all ranks have run out of data."""
        self._forget(self._rounds)
        self._store.delete_key(f"absent/{self._index}")
        self._store.delete_key("absent")

    def gathered(self, numbers: Sequence[float]) -> Tensor:
        """Return the numbers of every present rank.

        Args:
            numbers: This rank's numbers; the same count on every rank.

        Returns:
            A float64 tensor of shape ``[N, K]``: a row for each rank, of `ABSENT` for an absent
            one.

        Raises:
            RuntimeError: If a rank does not take part.
        """
        if self._store.add("absent", 0) > len(self._absent):
            self._absent = {r for r in range(self._size) if self._store.check([f"absent/{r}"])}
        self._rounds += 1
        self._store.set(self._place(self._index), pack(f"{len(numbers)}d", *numbers))  # type: ignore[arg-type]
        places = {r: self._place(r) for r in range(self._size) if r not in self._absent}
        self._store.wait(list(places.values()), self._timeout)
        rows = torch.full((self._size, len(numbers)), ABSENT, dtype=torch.float64)
        for rank, place in places.items():
            found = self._store.get(place)
            rows[rank] = torch.tensor(unpack(f"{len(numbers)}d", found), dtype=torch.float64)
        self._forget(self._rounds - 1)  # which all have read, for all have come to this one
        return rows

    def _forget(self, number: int) -> None:
        self._store.delete_key(f"{number}/{self._index}")

    def _place(self, rank: int) -> str:
        return f"{self._rounds}/{rank}"
