"""Name the ranks whose own gradient, before the all-reduce, is not that of their loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from safestep.measure.slopes import Slopes

WINDOW = 64  # audits whose differences are the usual ones
OUTSIDE = 3.0  # times the largest usual difference


class RankGradients:
    """Judge the gradients that the ranks had before the all-reduce, each by its own loss.

    The slope of a rank's loss along the update follows from its outputs, and again from the
    gradient that its backward pass left. The rank is off if the two differ by more than three times
    the largest usual difference of the last 64 audits, and their ratio is off by more than rounding
    (1e-4; 2 % in half precision). It is named at once if the ratio is off by more than 2 % (10 %),
    else at the second such audit in a row; none is named if most ranks are off. Clipping, loss
    scales and means over ranks come later and play no part.

    Attributes:
        named: The ranks that are off, and since which step.
    """

    def __init__(self) -> None:
        self.named: dict[int, int] = {}
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._suspects: dict[int, int] = {}

    def judge(self, step: int, ranks: Sequence[Slopes]) -> None:
        """Take what one audit showed.

        Args:
            step: The step's number.
            ranks: The slopes of each rank; empty if they are not known.
        """
        known = {rank: slopes for rank, slopes in enumerate(ranks) if slopes.reason is None}
        if not known:
            return
        off = {rank for rank, slopes in known.items() if not self._is_usual(slopes)}
        if 2 * len(off) > len(known):  # the loss has another term, or all are off
            return
        others = [abs(slopes.difference) for rank, slopes in known.items() if rank not in off]
        self._usual.append(max(others))
        # A rank that this audit does not show stays what it was.
        suspects = {rank: since for rank, since in self._suspects.items() if rank not in known}
        suspects |= {rank: self._suspects.get(rank, step) for rank in sorted(off)}
        gross = {rank for rank in off if known[rank].is_gross}
        sure = self.named.keys() | (self._suspects.keys() & off) | gross
        self._suspects = suspects
        self.named = {rank: since for rank, since in suspects.items() if rank in sure}

    def why_unnamed(self, slopes: Slopes) -> str | None:
        """Return why no rank is named for a gradient that is wrong; None on a lone rank.

        Args:
            slopes: Those of the batch of all ranks.
        """
        if not slopes.ranks or slopes.own is None:
            return None
        unknown = [rank for rank, each in enumerate(slopes.ranks) if each.reason is not None]
        if unknown:
            why = slopes.own.obstacle or f"the own gradient of rank {unknown[0]} is not known"
            return f"no rank is named, because {why}"
        off = [rank for rank, each in enumerate(slopes.ranks) if not self._is_usual(each)]
        if not off:
            return "before the all-reduce each rank's own gradient matched its loss"
        if 2 * len(off) > len(slopes.ranks):
            return "before the all-reduce the own gradients of most ranks were off"
        noun = "rank" if len(off) == 1 else "ranks"
        return f"only {noun} {' and '.join(map(str, off))} may be off, which the next audit tells"

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the run, as plain numbers and lists."""
        named, suspects = list(self.named.items()), list(self._suspects.items())
        return {"usual": list(self._usual), "named": named, "suspects": suspects}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Args:
            state: The state; it is not changed.
        """
        self._usual = deque(state["usual"], maxlen=WINDOW)
        self.named, self._suspects = dict(state["named"]), dict(state["suspects"])

    def _is_usual(self, slopes: Slopes) -> bool:
        is_small = abs(slopes.difference) <= OUTSIDE * max(self._usual, default=0.0)
        return is_small or slopes.is_near


def words(named: dict[int, int], ranks: Sequence[Slopes]) -> str:
    """Return which ranks are off, by how much and since when.

    Args:
        named: The ranks, and since which step.
        ranks: The slopes of each rank at the step under way.

    Example:
        >>> right, wrong = Slopes(-1.0, -1.0, 1.0), Slopes(-1.0, -1.05, 1.0)
        >>> words({1: 812}, [right, wrong, right])
        'rank 1: ratio 1.05 since step 812 (before the all-reduce; those of the others are 1)'
    """
    noun = "rank" if len(named) == 1 else "ranks"
    who = " and ".join(map(str, named))
    each = " and ".join(str(ranks[rank]) for rank in named)
    others = [slopes for r, slopes in enumerate(ranks) if r not in named and slopes.reason is None]
    furthest = max((abs(slopes.ratio - 1) for slopes in others), default=0.0)
    rest = f"1 to within {furthest:.0e}" if furthest else "1"
    since = min(named.values())
    return (
        f"{noun} {who}: ratio {each} since step {since} "
        f"(before the all-reduce; those of the others are {rest})"
    )
