"""Save the copies of a step that is known to be neither measured nor undone."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from safestep.capture.recorder import Recorder
from safestep.guard.retries import Retries
from safestep.parallel.norms import joint_norm

# These work element by element: a gradient that is finite and not huge gives a finite step.
_ELEMENTWISE = {
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta,
}  # fmt: skip
_SAFE = 1e4  # learning rate times gradient norm; half precision ends at 65504


class KnownUnmeasured:
    """Tell, before a step is made, whether it will be neither measured nor undone.

    It will be neither while `Retries` pauses, the gradients at the outputs look as they did, the
    optimizer works element by element, and gradient norm times learning rate is below 1e4. Then
    nothing is copied.

    Args:
        optimizer: The optimizer.
        recorder: Records the calls of its steps.
        retries: Says when to try again.
        is_possible: Whether nothing else needs to see every step.
    """

    def __init__(
        self, optimizer: Optimizer, recorder: Recorder, retries: Retries, *, is_possible: bool
    ) -> None:
        self._optimizer, self._recorder, self._retries = optimizer, recorder, retries
        self._is_possible = is_possible and type(optimizer) in _ELEMENTWISE

    def reason(self) -> str | None:
        """Return why the step under way is neither measured nor undone, None if it may be."""
        if not (self._is_possible and self._retries.is_pausing and self._is_safe()):
            return None
        if self._retries.is_due(self._recorder.looks()):
            return None
        self._retries.skip()
        return self._retries.reason

    def end_step(self) -> bool:
        """Keep no gradients at the next step if the loss is still the same.

        Returns:
            Whether the next step may be unmeasured, which its gradients will show.
        """
        self._recorder.resting = self._retries.paused if self._is_possible else ()
        return bool(self._recorder.resting)

    def _is_safe(self) -> bool:
        groups = self._optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        norm = float(joint_norm([p.grad for p in params if p.grad is not None]))
        return all(norm * abs(float(group["lr"])) < _SAFE for group in groups)
