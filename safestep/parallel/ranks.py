"""Gather numbers from the ranks that take the same steps, and say what was waited for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from os import urandom
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from safestep._warn import RaisedOnPurpose
from safestep.parallel.collectives import apart_from_shards, gathered, rank, world_size
from safestep.parallel.join import JoinShadow
from safestep.parallel.present import PresentRanks
from safestep.parallel.stages import pipeline_stages

# What gloo says besides what happened: the line of its source, and whom to ask.
_BLAME = re.compile(r"^\[[^\]]*\] |\. This is typically caused by .*")


class MissingRankError(RaisedOnPurpose, RuntimeError):
    """A rank did not take part in what all ranks do."""


class Ranks:
    """The ranks that take the same steps.

    Every gather must run on every rank, in the same order. If a rank does not take part, the others
    raise when the group's timeout ends. Within ``ddp.join()`` ranks that have no more data take no
    part; when none has any more, they take over the state of one that had data to the end.

    Args:
        params: The trained parameters.
        group: The ranks; None for the default process group, if there is one.
        model: What is trained. If it is a DistributedDataParallel, compiled or not, its ``join()``
            is followed.

    Attributes:
        size: Number of ranks.
        index: This rank.
        step: Number of the step under way, for messages.
        are_compared: Whether the ranks are known to have been set up alike.
    """

    def __init__(
        self, params: Sequence[Tensor], group: ProcessGroup | None, model: nn.Module | None = None
    ) -> None:
        self.size, self.index, self.step = world_size(group), rank(group), 0
        self._model = model
        self.are_compared = self.size == 1
        try:
            self._group = apart_from_shards(params, group)
        except RuntimeError as error:
            raise self.missing("to attach its SafeStep", str(error)) from error
        inner = getattr(model, "_orig_mod", model)  # torch.compile wraps
        is_ddp = self.size > 1 and isinstance(inner, DistributedDataParallel)
        self._shadow: JoinShadow | None = None
        self._present: PresentRanks | None = None  # within join()
        if is_ddp:
            self._shadow = JoinShadow(inner, self._enter, self._leave, self._rejoin)
        self._state: tuple[Callable[[], Any], Callable[[Any], None]] | None = None

    def share(self, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        """Let ranks that were absent take over the state of one that was not.

        Args:
            get: Returns this rank's state.
            put: Takes another rank's state.
        """
        self._state = get, put

    def gather(self, numbers: Sequence[float], what: str) -> Tensor:
        """Return the numbers of every rank.

        Args:
            numbers: This rank's numbers; the same count on every rank.
            what: What they are, for the message if a rank does not send them.

        Returns:
            A float64 tensor on the CPU of shape ``[N, K]``: a row for each rank, of `ABSENT` for
            one that has no more data.

        Raises:
            RuntimeError: If a rank does not take part.
        """
        try:
            if self._present is not None and self._shadow is not None and self._shadow.is_joining:
                return self._present.gathered(numbers)
            return gathered(numbers, self._group)
        except RuntimeError as error:
            raise self.missing(f"to send {what}", str(error)) from error

    def gather_texts(self, text: str | None, what: str) -> list[str | None]:
        """Return the texts of every rank.

        Args:
            text: This rank's text.
            what: What it is, for the message if a rank does not send it.

        Returns:
            A text for each rank, None for one that has none.
        """
        encoded = list((text or "").encode())
        lengths = self.gather([len(encoded) if text is not None else -1], what).flatten().tolist()
        longest = int(max(lengths))
        rows = self.gather(encoded + [0] * (longest - len(encoded)), what) if longest > 0 else None
        return [
            None if length < 0
            else bytes(map(int, rows[index, : int(length)])).decode() if rows is not None else ""
            for index, length in enumerate(lengths)
        ]  # fmt: skip

    def all_are(self, *flags: bool, what: str) -> list[bool]:
        """Return whether each of some things is so on every rank.

        Args:
            *flags: Whether they are so on this one.
            what: What they are, for the message if a rank does not send them.

        Returns:
            The same on every rank.
        """
        if self.size == 1:
            return list(flags)
        return (self.gather(flags, what) == 1).all(0).tolist()

    def mean(self, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return the mean over the ranks of tensors that each rank computes.

        Args:
            make: Computes this rank's, of the same shapes on every rank. They are overwritten.

        Returns:
            The means.

        Raises:
            RuntimeError: On every rank, if one cannot compute its tensors.
        """
        tensors: Sequence[Tensor] = ()
        failed: Exception | None = None
        try:
            tensors = make()
        except Exception as error:
            failed = error
        numel = sum(tensor.numel() for tensor in tensors)
        row = [failed is None, len(tensors), numel]
        rows = self.gather(row, "whether it made what is averaged")
        if not (rows[:, 0].all() and (rows == rows[0]).all()):
            raise RuntimeError("a rank did not make what is averaged") from failed
        for tensor in tensors:
            dist.all_reduce(tensor, group=self._group)
            tensor.div_(self.size)
        return tensors

    def stages(self) -> tuple[int, ...]:
        """Return which stages of a pipeline this rank's model holds, none without a pipeline."""
        return () if self._model is None else pipeline_stages(self._model)

    def detach(self) -> None:
        """Give the model its own ``join()`` back."""
        if self._shadow is not None:
            self._shadow.detach()

    def _enter(self) -> None:
        mine = int.from_bytes(urandom(6), "big")  # exact in float64
        name = self.gather([mine], "that it enters join()")[0, 0]
        self._present = PresentRanks(self._whole_group, f"{int(name)}")

    def _leave(self) -> None:
        if self._present is not None:
            self._present.leave()

    def _rejoin(self, is_last: bool) -> None:
        """Take the state of a rank that was there to the end, as DDP takes its parameters."""
        assert self._present is not None
        was_absent = self._present.is_absent
        mine = [self.index if is_last else -1, was_absent]
        source, is_any_absent = gathered(mine, self._group).amax(0).tolist()
        self._present.close()
        if not is_any_absent or self._state is None:
            return
        get, put = self._state
        states = [(get(), self.are_compared)]
        source_rank = dist.get_global_rank(self._whole_group, int(source))
        dist.broadcast_object_list(states, src=source_rank, group=self._group)
        if was_absent:
            state, self.are_compared = states[0]
            put(state)

    @property
    def _whole_group(self) -> ProcessGroup:
        group = self._group or dist.group.WORLD
        assert group is not None
        return group

    def missing(self, what: str, why: str) -> MissingRankError:
        """Return the error of a rank that waited for others in vain.

        Args:
            what: What it waited for them to do.
            why: What happened then.

        Returns:
            The error.
        """
        reason = _BLAME.sub("", " ".join(why.split()))
        return MissingRankError(
            f"SafeStep: expected each of {self.size} ranks {what} at step {self.step}, got nothing "
            f"from at least one of them ({reason[:200].rstrip('.')}). Look first for the error of "
            "a rank that ended. Every rank needs a SafeStep on this optimizer, and as many steps "
            "as the others; where data are uneven, train within `with ddp.join():`."
        )
