"""Notice which loss a recorded call computes where none of its outputs is seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from safestep.capture.autograd_graph import Node, operations_of_loss
from safestep.capture.call import Call
from safestep.capture.failures import Failures
from safestep.capture.hooks import kept_out
from safestep.parallel.shards import is_sharded


class LossNotice:
    """Note the operations of a loss when the first trained parameter gets its gradient.

    The hook is on the node of the graph: for one on the parameter, a compiled training step would
    be compiled anew.

    Args:
        params: Returns the trained parameters.
        failures: Takes what could not be noticed.
    """

    def __init__(self, params: Callable[[], list[Tensor]], failures: Failures) -> None:
        self._params = params
        self._failed = partial(failures.note, "reading the loss", is_needed=False)
        # The nodes too: until the graph is made, nothing else holds them.
        self._held: list[tuple[Node, RemovableHandle]] = []

    def expect(self, call: Call) -> None:
        """Note the loss of a call that is about to run, in ``call.losses``."""
        param = next(iter(self._params()), None)
        if param is None or is_sharded(param) or not param.requires_grad:
            return

        def note(*_: Any) -> None:
            handle.remove()
            call.losses.add(operations_of_loss())

        node = get_gradient_edge(param).node
        handle = node.register_prehook(kept_out(note, self._failed))
        self._held.append((node, handle))

    def end_step(self) -> None:
        """Expect nothing more of the calls so far."""
        for _, handle in self._held:
            handle.remove()
        self._held.clear()
