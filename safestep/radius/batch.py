"""Reduce the logit tangents of a batch to its smallest radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safestep.radius.bounds import RUNGS, RungOption, ladder_radius, logit_spread
from safestep.radius.loss_change import NO_CHANGE, LossChange, LossChangeSum, RowLoss


@dataclass(frozen=True, slots=True)
class LogitTangent:
    """Logits and their tangent along the whole update.

    Attributes:
        name: Which logits.
        source: The logits before the update, ``[*B, C]``, or a function that computes them (see
            ``ladder_radius``).
        tangent: Their directional derivative. Shape ``[*B, C]``, unit: logits.
        mask: True where a row counts, None if all do. Shape ``[*B]``.
        error: Error estimate of each row's spread, None if unknown. Shape ``[*B]``, unit: logits.
        loss: Weights and labels of the rows in the loss, or why they are not known.
    """

    name: str
    source: Tensor | Callable[..., Tensor]
    tangent: Tensor
    mask: Tensor | None = None
    error: Tensor | None = None
    loss: RowLoss | str = "nothing tells the rows' weights"

    @property
    def logits(self) -> Tensor:
        """The logits; computed at each access if they are too large to store."""
        source = self.source
        return source if isinstance(source, Tensor) else source().view_as(self.tangent)


@dataclass(frozen=True, slots=True)
class Row:
    """The place of a row in a batch.

    Attributes:
        set: Number of its set of rows: a batch has one of each head and micro-batch.
        sets: How many there are.
        index: Where it is in its set.
        shape: The set's ``[*B]``.
    """

    set: int
    sets: int
    index: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchRadius:
    """The smallest radius of a batch, as Python numbers.

    Attributes:
        radius: In multiples of the update, NaN if any row's radius is NaN.
        spread: Largest spread along the whole update, unit: logits.
        index: Index of the row that set the radius, counted over all sets of rows.
        head: Which set of logits that row belongs to, None if there is only one.
        counts_every_row: Whether the masks excluded every row, so that all rows were used.
        change: What linearised logits predict of the loss.
        row: Where that row is, None if no row counts.
    """

    radius: float
    spread: float
    index: int
    head: str | None
    counts_every_row: bool = False
    change: LossChange = NO_CHANGE
    row: Row | None = None


@dataclass(frozen=True, slots=True)
class BatchRule:
    """How the rows of a batch become one radius.

    Attributes:
        rung: Which radius of the ladder.
        limit: Largest allowed normalised step; a row that a lower rung proves to be within it
            climbs no further. None: every row climbs.
        quantile: Use this quantile of the rows' r in place of their maximum. Not certified.
    """

    rung: RungOption = "bound"
    limit: float | None = None
    quantile: float | None = None

    def reduce(self, rows: Iterable[LogitTangent]) -> BatchRadius:
        """Return the smallest radius of the rows that count.

        If no row counts (all labels ignored, all advantages zero), the update is momentum alone.
        It still moves the predictions of every row, so all rows count, at their bound.

        Args:
            rows: Logits and tangents, one set of rows at a time.

        Returns:
            The radius and the row that set it.

        Raises:
            ValueError: If there are no rows.
        """
        heads: list[tuple[str, torch.Size]] = []
        uncounted: list[Tensor] = []
        change = LossChangeSum()
        row = smallest_row(
            _noting(rows, heads, uncounted, change),
            rung=self.rung, limit=self.limit, quantile=self.quantile,
        )  # fmt: skip
        radius, spread, index, *total = torch.cat((row, change.total.to(row.device))).tolist()
        counts_every_row = len(uncounted) == len(heads)
        if counts_every_row:
            spreads = torch.cat(uncounted)
            spread, index = float(spreads.max()), int(spreads.argmax())
            radius = math.pi / spread if spread else math.inf
        place = _place_of(int(index), [shape for _, shape in heads])
        names = [name for name, _ in heads]
        head = names[place.set] if place is not None and len(set(names)) > 1 else None
        found = change.of(total)
        return BatchRadius(radius, spread, int(index), head, counts_every_row, found, place)


def smallest_row(
    rows: Iterable[LogitTangent],
    *,
    rung: RungOption,
    limit: float | None = None,
    quantile: float | None = None,
) -> Tensor:
    """Return the radius of a batch, its largest spread and the row that set the radius.

    Args:
        rows: Logits and tangents, one set of rows at a time.
        rung: Which radius of the ladder.
        limit: Largest allowed normalised step; a row that a lower rung proves to be within it
            climbs no further. None: every row climbs.
        quantile: Use this quantile of the rows' r in place of their maximum. Not certified.

    Returns:
        A float64 tensor ``[radius, spread, index]`` on the device of the rows. Radius is in
        multiples of the update, NaN if any row's radius is NaN.

    Raises:
        ValueError: If there are no rows.
    """
    radii, spreads = [], []
    for row in rows:
        spread = logit_spread(row.tangent, mask=row.mask)
        radius = math.pi / spread
        # Logits that are too large to store are computed only if the bound leaves a row undecided.
        if RUNGS[rung].needs_logits and not (limit and bool((radius >= 1 / limit).all())):
            radius = ladder_radius(
                row.source, row.tangent, mask=row.mask, limit=limit, rung=rung,
                only_smallest=quantile is None, spread=spread,
            )  # fmt: skip
            if quantile is None:
                limit = _raised(limit, float(radius.min()))
        radii.append(radius.flatten().double())
        spreads.append(spread.amax().double())
        del row  # frees its memory before the next one is computed
    if not radii:
        raise ValueError("smallest_row: expected at least one set of rows, got none.")
    radius, index = _lower_quantile(torch.cat(radii), quantile)
    return torch.stack([radius, torch.stack(spreads).amax(), index.double()])


def _lower_quantile(radii: Tensor, quantile: float | None) -> tuple[Tensor, Tensor]:
    if quantile is None:
        return radii.min(0)
    # A masked row has an infinite radius; it does not count in the quantile.
    live = int((radii != math.inf).sum())
    rank = 1 + math.floor((1.0 - quantile) * max(live - 1, 0))
    radius, index = radii.kthvalue(rank)
    return torch.where(radii.isnan().any(), math.nan, radius), index


def _raised(limit: float | None, smallest: float) -> float | None:
    """Return the limit raised so that only rows below the smallest radius found so far climb."""
    return max(limit or 0.0, 1 / smallest) if 0 < smallest < math.inf else limit


def _noting(
    rows: Iterable[LogitTangent],
    heads: list[tuple[str, torch.Size]],
    uncounted: list[Tensor],
    change: LossChangeSum,
) -> Iterator[LogitTangent]:
    """Yield the rows unchanged; note heads, spreads of fully masked sets and the loss's change."""
    for row in rows:
        change.add(row.logits, row.tangent, row.mask, row.loss)
        heads.append((row.name, row.tangent.shape[:-1]))
        if row.mask is not None and not bool(row.mask.any()):
            uncounted.append(logit_spread(row.tangent).flatten().double())
        yield row
        del row  # frees its memory before the next one is computed


def _place_of(index: int, shapes: Sequence[torch.Size]) -> Row | None:
    for number, shape in enumerate(shapes):
        if index < shape.numel():
            place = torch.unravel_index(torch.tensor(index), shape)
            return Row(number, len(shapes), tuple(map(int, place)), tuple(shape))
        index -= shape.numel()
    return None
