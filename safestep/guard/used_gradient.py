"""Tell whether ``.grad`` after a step still is the gradient that the step was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer, Rprop

_SEVERAL = "the optimizer evaluates its closure at several places in a step"
_ANEW = "the gradients were computed anew during the step"
_IN_PLACE = "the gradients were changed in place during the step, by the optimizer or its closure"


class UsedGradient:
    """Note the gradients before a step, one for all: an optimizer treats them alike.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._param = next((p for p in params if p.grad is not None), None)
        self._gradient = None if self._param is None else self._param.grad
        self._version = -1 if self._gradient is None else self._gradient._version

    def obstacle(self, optimizer: Optimizer) -> str | None:
        """Return why ``.grad`` is not what the optimizer used, None if it is.

        Args:
            optimizer: The optimizer, after its step.

        Example:
            >>> import torch
            >>> param = torch.nn.Parameter(torch.ones(2))
            >>> sgd = torch.optim.SGD([param], momentum=0.9, nesterov=True, foreach=True)
            >>> param.grad = torch.ones(2)
            >>> used = UsedGradient([param])
            >>> sgd.step()
            >>> used.obstacle(sgd)[:38]
            'the gradients were changed in place du'
        """
        if isinstance(optimizer, LBFGS):
            return _SEVERAL
        groups = optimizer.param_groups
        if isinstance(optimizer, Rprop) or any(map(_adds_momentum_in_place, groups)):
            return _IN_PLACE
        if type(optimizer).__module__.startswith("torch.optim"):  # of which no other does so
            return None
        if self._param is None or self._gradient is None:
            return None
        if self._param.grad is not self._gradient:
            return _ANEW
        return _IN_PLACE if self._gradient._version != self._version else None


def _adds_momentum_in_place(group: dict[str, Any]) -> bool:
    """Return whether a group of torch's SGD turns its gradients into Nesterov's directions."""
    if not group.get("nesterov") or group.get("fused") or group.get("weight_decay"):
        return False
    is_on_gpu = any(param.is_cuda for param in group["params"])
    return bool(group.get("foreach")) or (group.get("foreach") is None and is_on_gpu)
