"""Compute the update of an optimizer step before the step, a few rows at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from safestep.capture.call import Call
from safestep.measure.update import Update
from safestep.parallel.norms import joint_norm
from safestep.parallel.placements import placed_like, shares
from safestep.parallel.shards import are_sharded, local, local_parts

# Proportional to lr, with a state that does not depend on it: a step is scaled by scaling lr.
_NAMES = ("SGD", "Adam", "AdamW", "Muon")
_SUPPORTED = tuple(getattr(optim, name) for name in _NAMES if hasattr(optim, name))
MIN_PIECE = 2**14  # smallest number of elements that is worth a run of the optimizer
_PIECES = 64  # so small that the copies of one stay below an eighth of the parameters


class Lookahead:
    """An ``Undo`` that computes the update before the step, so that nothing has to be copied.

    The optimizer's own code runs on copies of a few rows at a time: the update is that of the real
    step, up to rounding, and this object holds nothing of the model's size. To scale the step it
    scales the learning rate; to prevent the step it removes the gradients until `release`.

    Args:
        optimizer: An SGD, Adam, AdamW or Muon of torch.

    Attributes:
        params: The parameters that the step is going to change: those with a gradient.

    Raises:
        ValueError: If the optimizer is another one or a subclass, which may use its learning rate
            in another way. Also if Muon's matrices are sharded: Muon orthogonalises a whole matrix,
            and a rank holds only a part.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> param.grad = torch.tensor([4.0, -4.0])
        >>> ahead = Lookahead(torch.optim.SGD([param], lr=0.5))
        >>> ahead.take()
        >>> list(ahead.update([]).change), param.tolist()
        ([tensor([-2.,  2.])], [1.0, 2.0])
    """

    def __init__(self, optimizer: Optimizer) -> None:
        _check_optimizer(optimizer)
        self._optimizer = optimizer
        # The same kind of optimizer, which runs on copies of parameters and state.
        self._double = type(optimizer)([torch.zeros(1, 1)])  # type: ignore[call-arg]
        self._by_rows = type(optimizer).__name__ != "Muon"  # which needs whole matrices
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._rates: list[Any] = []
        self._own: list[Tensor] = []  # this rank's part of each gradient
        self.params: list[Tensor] = []

    def take(self) -> None:
        """Begin a step: put back what an earlier one that raised left changed."""
        self.release()

    def update(self, calls: Sequence[Call]) -> Update:
        """Return the update that the step will make with the present gradients: see ``Undo``.

        Its `change` is computed again at each iteration.
        """
        groups = self._optimizer.param_groups
        self.params = [p for group in groups for p in group["params"] if p.grad is not None]
        start = local_parts(self.params)
        self._own = [placed_like(param.grad, param) for param in self.params]
        return _Proposal(
            calls, self.params, start, _Change(self),
            is_made=False, is_sharded=are_sharded(self.params),
        )  # fmt: skip

    def restore(self) -> None:
        """Prevent the step: an optimizer leaves parameters without a gradient alone."""
        self._gradients = [(param, param.grad) for param in self.params]
        for param in self.params:
            param.grad = None

    def rescale(self, scale: float) -> None:
        """Make the step `scale` times as long.

        Args:
            scale: Factor of the update.
        """
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr"] * scale  # a new tensor, where it is one

    def release(self) -> None:
        """Put gradients and learning rates back, after the step."""
        for param, gradient in self._gradients:
            param.grad = gradient
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._gradients, self._rates, self.params, self._own = [], [], [], []

    def pieces(self) -> Iterator[list[_Piece]]:
        """Yield lists of pieces of the update, in the order of `params`."""
        limit = max(MIN_PIECE, sum(local(param).numel() for param in self.params) // _PIECES)
        index = 0
        for group in self._optimizer.param_groups:
            together: list[_Piece] = []
            size = 0
            for param in (param for param in group["params"] if param.grad is not None):
                for rows in self._rows(param, limit):
                    together.append(_Piece(index, param, rows))
                    size += together[-1].of(param).numel()
                    if size >= limit:
                        yield self._moved(group, together)
                        together, size = [], 0
                index += 1
            if together:
                yield self._moved(group, together)

    def _rows(self, param: Tensor, limit: int) -> Iterator[slice | None]:
        whole = local(param)
        if not self._by_rows or whole.numel() <= limit or param.grad.is_sparse:  # type: ignore[union-attr]
            yield None
            return
        count = max(1, limit * len(whole) // whole.numel())
        for first in range(0, len(whole), count):
            yield slice(first, min(first + count, len(whole)))

    def _moved(self, group: dict[str, Any], pieces: list[_Piece]) -> list[_Piece]:
        double, state = self._double, self._optimizer.state
        moved = [piece.of(piece.param).clone() for piece in pieces]
        for piece, copy in zip(pieces, moved, strict=True):
            gradient = piece.of(self._own[piece.index])
            # SGD writes to it, foreach with nesterov and fused with a scaler; Muon does not.
            copy.grad = gradient.clone() if self._by_rows else gradient
        double.param_groups = [{**group, "params": moved}]
        double.state = defaultdict(
            dict, {copy: piece.copied(state[piece.param])
                   for piece, copy in zip(pieces, moved, strict=True) if piece.param in state},
        )  # fmt: skip
        for name in ("grad_scale", "found_inf"):  # a GradScaler leaves unscaling to a fused step
            setattr(double, name, getattr(self._optimizer, name, None))
        # Without the hooks that others may have put on every optimizer of the process.
        type(double).step.__wrapped__(double)  # type: ignore[attr-defined]
        double.param_groups, double.state = [], defaultdict(dict)
        for piece, copy in zip(pieces, moved, strict=True):
            copy.grad = None
            piece.update = copy.sub_(piece.of(piece.param))
        return pieces


@dataclass(slots=True, eq=False)
class _Piece:
    """Rows of a parameter (all of them where `rows` is None) and their update, once computed."""

    index: int
    param: Tensor
    rows: slice | None
    update: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        shard = local(tensor.detach())
        return shard if self.rows is None else shard[self.rows]

    def copied(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name: self._copied(value) for name, value in state.items()}

    def _copied(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (self.of(value) if value.shape == self.param.shape else value).clone()

    @property
    def is_first(self) -> bool:
        return self.rows is not None and self.rows.start == 0

    @property
    def is_last(self) -> bool:
        return self.rows is None or self.rows.stop == len(local(self.param))


class _Change(Sequence[Tensor]):
    """Lazy sequence of parameter updates; the optimizer runs at each iteration."""

    def __init__(self, ahead: Lookahead) -> None:
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self._ahead.params)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Tensor]:
        whole = torch.empty(0)
        for piece, update in self._written():
            if piece.rows is None:
                whole = update
            else:
                if piece.is_first:
                    whole = torch.empty_like(local(piece.param.detach()))
                whole[piece.rows] = update
            if piece.is_last:
                yield whole

    def write(self, places: Sequence[Tensor]) -> None:
        """Write the update of every parameter into its place, one piece at a time."""
        for piece, update in self._written():
            place = places[piece.index]
            (place if piece.rows is None else place[piece.rows]).copy_(update)

    def _written(self) -> Iterator[tuple[_Piece, Tensor]]:
        for pieces in self._ahead.pieces():
            for piece in pieces:
                assert piece.update is not None
                yield piece, piece.update
                piece.update = None


@dataclass(slots=True)
class _Proposal(Update):
    """An update that is still to come, whose norm is computed piece by piece."""

    def parts(self) -> list[Tensor]:
        own_shares = shares(self.params)
        ahead = self.change._ahead  # type: ignore[attr-defined]
        norms = []
        for pieces in ahead.pieces():
            for share in {own_shares[piece.index] for piece in pieces}:
                moves = [piece.update for piece in pieces if own_shares[piece.index] == share]
                norms.append(joint_norm(moves) * sqrt(share))
            pieces.clear()  # frees them before the next ones are made
        return norms


def _check_optimizer(optimizer: Optimizer) -> None:
    if type(optimizer) not in _SUPPORTED:
        raise ValueError(
            "SafeStep: expected an `optimizer` that is exactly one of "
            f"{', '.join(kind.__name__ for kind in _SUPPORTED)} with copy=False, got "
            f"{type(optimizer).__name__}. Leave `copy` at True: that works with every optimizer."
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if type(optimizer).__name__ == "Muon" and are_sharded(params):
        raise ValueError(
            "SafeStep: expected whole parameters for a Muon `optimizer` with copy=False, got "
            "sharded ones. Leave `copy` at True."
        )
