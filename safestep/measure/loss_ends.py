"""The tensors at which the recorded part of a loss ends, and the loss's gradient there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from safestep.capture.call import Call
from safestep.capture.outputs import named_tensors
from safestep.parallel.shards import whole


class UnknownGradientError(RuntimeError):
    """The loss's gradient at an output is not known; the message says why."""


class LossEnds:
    """Pair what calls return with the loss's gradient there.

    Losses of calls that were passed to ``Recorder.record`` count with their mean.

    Args:
        calls: The calls of one update.
        is_made: Whether the update was made.
    """

    def __init__(self, calls: Sequence[Call], *, is_made: bool) -> None:
        self._share = 1 / max(len(calls), 1)
        self._is_made = is_made
        self._scale: float | None = None

    def of(
        self, call: Call, output: Any, is_live: Callable[[Tensor], bool]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tensors and the loss's gradient there, divided by the scale of a GradScaler.

        Args:
            call: The call.
            output: What it returned when it ran again.
            is_live: Whether a tensor depends on the parameters.

        Yields:
            A tensor of the output, and a tensor of its shape.

        Raises:
            UnknownGradientError: If a gradient is not known.
        """
        if not (call.kept.sums or call.kept.missing):
            loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
            losses = [each for _, each in named_tensors(loss) if is_live(each)]
            if len(losses) != 1 or losses[0].numel() != 1:
                raise UnknownGradientError("the recorded call does not return the loss alone")
            yield losses[0], torch.full_like(losses[0].detach(), self._share)
            return
        outputs = dict(named_tensors(output))
        gradients, obstacle = call.kept.ends()
        if obstacle is not None:
            raise UnknownGradientError(obstacle)
        for name, gradient in gradients.items():
            tensor = outputs.get(name)
            if tensor is None or tensor.shape != gradient.shape:
                raise UnknownGradientError(f"{name} is another tensor when the call runs again")
            if is_live(tensor):
                yield tensor, whole(gradient) / self.loss_scale()

    def loss_scale(self) -> float:
        """Return the loss scale: a factor of gradients in backward that the step's do not have."""
        if self._scale is None:
            self._scale = _loss_scale(is_made=self._is_made)
        return self._scale


def _loss_scale(*, is_made: bool) -> float:
    """Return the scale of the GradScaler whose ``step`` is running.

    Args:
        is_made: Whether the optimizer has made its step; a fused one divides by the scale in it.

    Returns:
        1.0 if there is none, or if the step's gradient is not divided yet.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _SCALER_STEP:
        frame = frame.f_back
    if frame is None:
        return 1.0
    scaler, optimizer = frame.f_locals["self"], frame.f_locals["optimizer"]
    is_divided = is_made or getattr(optimizer, "grad_scale", None) is None
    return float(scaler.get_scale()) if is_divided else 1.0


_SCALER_STEP = GradScaler.step.__code__
