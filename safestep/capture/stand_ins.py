"""Notice forward calls that run on other parameters than the model's own."""

from __future__ import annotations

from torch import nn

from safestep.parallel.shards import are_sharded

# Calls that are looked at from the first on; after them, one in so many.
_FIRST_LOOKS = 8
_GAP = 64

_OBSTACLE = (
    "a forward call ran on other parameters than the model's own, as in meta-learning or with "
    "torch.func.functional_call, so it cannot be run again alone. Tell the guard the whole step, "
    "guard.record(step, *args), just before it runs, where step returns the loss"
)


class StandIns:
    """Tell whether a forward call can run again on the parameters of the model.

    ``torch.func.functional_call`` puts other tensors in the place of parameters while it runs, and
    meta-learning libraries call clones of the model that share its hooks. What stands in for a
    parameter was computed from it, so it is no leaf of the autograd graph.

    Args:
        module: The module whose calls are recorded.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> stand_ins = StandIns(module)
        >>> module.register_forward_pre_hook(lambda module, args: print(stand_ins.obstacle(module)))
        <torch.utils.hooks.RemovableHandle object at ...>
        >>> import torch
        >>> _ = module(torch.ones(2))
        None
        >>> others = {name: 2 * param for name, param in module.named_parameters()}
        >>> _ = torch.func.functional_call(module, others, torch.ones(2))
        a forward call ran on other parameters than the model's own, ...
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Where shards are gathered, what the module holds during a call are views of others.
        self._is_sharded = are_sharded(module.parameters())
        self._has_seen_some = False
        self._num_calls = 0

    def obstacle(self, called: nn.Module) -> str | None:
        """Return why a call that is about to happen cannot run again, None if it can.

        Args:
            called: The module that is called: the recorded one, or a clone with the same hooks.
        """
        self._num_calls += 1
        if called is not self._module:
            return _OBSTACLE
        is_looked_at = self._has_seen_some or self._num_calls <= _FIRST_LOOKS
        if self._is_sharded or not (is_looked_at or self._num_calls % _GAP == 0):
            return None
        if all(param.is_leaf for param in called.parameters()):
            return None
        self._has_seen_some = True
        return _OBSTACLE
