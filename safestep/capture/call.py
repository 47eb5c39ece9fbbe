"""One recorded call of a model, which can run again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from operator import is_
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from safestep._torch import tree_flatten, tree_unflatten
from safestep.capture.attributes import Modes
from safestep.capture.autocast import autocast_regions, autocast_state
from safestep.capture.autograd_functions import visible_functions
from safestep.capture.effects import Start
from safestep.capture.evidence import EvidenceKeeper
from safestep.capture.gradient import GradientEvidence, first_rows, zero_sum_axis
from safestep.capture.output_gradients import OutputGradients
from safestep.capture.random_state import CallConditions, RandomState
from safestep.capture.results import OutputResult
from safestep.capture.unwinding import undone
from safestep.parallel.shards import whole

_NO_GRAPH = "does not require grad"  # says torch to who asks for a gradient without a graph


@dataclass(slots=True, eq=False)
class Call:
    """A call that an update was computed from: the function, its arguments and conditions.

    Attributes:
        function: The function to call again.
        leaves: Leaves of the argument tree, detached.
        structure: The argument tree; None where all arguments are positional tensors.
        random: Random state just before the call, so that dropout draws the same mask.
        autocast: ``(device type, dtype)`` of every autocast region around the call.
        modes: Every submodule, and whether it was in train mode.
        start: What the call may change, as it was before the call.
        generators: States of global generators before the call, where it shows what it draws.
        conditions: Recorded `random` and `modes`, and checks them when the call runs again.
        lacks: Generators that the re-run drew from and `random` does not hold.
        unread: By output name, a function for each backward pass that reads what its gradient
            shows; run when asked.
        samples: By output name, the latest gradient that is not read yet.
        kept: The gradients at the outputs, to audit that of the parameters.
        results: What is kept of its outputs, by name; None of a call passed to `Recorder.record`.
        keeper: Keeps what its gradients show; None for a call passed to `Recorder.record`.
        empty: Names of outputs that have a gradient and no element.
        losses: The operations of each loss a gradient of which came back, see
            ``operations_of_loss``.
        is_resting: Whether its gradients were not kept, since its loss is not measured for now.
        obstacle: Why the call cannot run again, None if it can.
        opened: Number of the call, in the order in which calls began.
        queued: Number of the call that was the latest to begin when a gradient first came back.
        signals: Tensors whose 2-norm tells unusual data from usual: the smallest and largest
            output, the loss's gradient there or its norm; of a call passed to `Recorder.record`,
            whose output is the loss, the largest input. Empty unless the Recorder watches.
        examples: How many of its first examples run again; None for all.
        place: What tells whether the parameters have moved since; None where nothing does.
        is_elsewhere: Whether they moved between the call and the step, as in sharpness-aware
            minimization: its gradient is not that at the start of the update.
        is_fresh: Whether every gradient was zero when the backward pass of the call began: a
            boolean on the device, or None where that is known without reading the gradients.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    structure: Any
    random: RandomState
    autocast: tuple[tuple[str, torch.dtype], ...]
    modes: Modes
    start: Start
    generators: dict[str, Any] | None
    conditions: CallConditions
    lacks: list[str] = field(default_factory=list)
    unread: dict[str, list[Callable[[], GradientEvidence]]] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    kept: OutputGradients = field(default_factory=OutputGradients)
    results: dict[str, OutputResult] | None = None
    keeper: EvidenceKeeper | None = None
    empty: list[str] = field(default_factory=list)
    losses: set[str | None] = field(default_factory=set)
    is_resting: bool = False
    obstacle: str | None = None
    signals: list[Tensor] = field(default_factory=list)
    is_fresh: Tensor | None = None
    opened: int = 0
    queued: int = 0
    examples: int | None = None
    place: tuple[int, int] | None = None
    is_elsewhere: bool = False
    _gradients: dict[str, GradientEvidence] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        conditions: CallConditions,
    ) -> Call:
        """Return the description of a call that is about to happen."""
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, structure = tree_flatten((args, kwargs))
        else:
            leaves, structure = args, None
        leaves = list(map(_detached, leaves))
        random, modes = conditions.record()
        are_threads = threading.active_count() > 1  # which may draw while the call runs again
        return cls(
            function, leaves, structure, random, autocast_regions(), modes,
            conditions.effects.before(leaves, modes),
            conditions.unused_generators.before(modes) if are_threads else None, conditions,
        )  # fmt: skip

    @property
    def num_examples(self) -> int:
        """Size of the first axis of the first tensor among the arguments, 0 if there is none."""
        tensors = (each for each in self.leaves if isinstance(each, Tensor) and each.ndim)
        return next(map(len, tensors), 0)

    def first(self, examples: int) -> Call:
        """Return the same call of its first examples alone.

        Every tensor as long as the first one is cut. Whether its rows are examples, and whether
        these are independent of each other, only a comparison of the outputs shows.

        Args:
            examples: How many.

        Raises:
            ValueError: If the gradient at an output is not as long.
        """
        every = self.num_examples
        gradients = {name: each.first(examples, every) for name, each in self.gradients.items()}
        return replace(
            self, examples=examples, unread={}, samples={}, lacks=[], _gradients=gradients
        )

    @property
    def gradients(self) -> dict[str, GradientEvidence]:
        """By output name, what the gradient of the loss shows about that output."""
        self.read_gradients()
        return self._gradients

    @property
    def arguments(self) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments; one that was changed since is as before the call where that was kept."""
        held = self.start.values
        leaves = [held.get((at, type(leaf)), leaf) for at, leaf in enumerate(self.leaves)]
        return (leaves, {}) if self.structure is None else tree_unflatten(leaves, self.structure)

    def read_gradients(self) -> None:
        """Read the gradients of all backward passes through the outputs."""
        while self.unread:
            name, reads = self.unread.popitem()
            for read in reads:
                known = self._gradients.get(name)
                self._gradients[name] = read() if known is None else known.joined(read())

    def look(self) -> Hashable:
        """Return what can be told of the loss without running the call again.

        Returns:
            The function's name and the operations of the loss; where these are not known, the class
            axis that a few rows of each gradient show. It does not depend on how many rows a batch
            has.
        """
        axes: dict[str, int | None] = {}
        if None in self.losses:
            axes |= {name: evidence.class_axis for name, evidence in self._gradients.items()}
            axes |= {name: zero_sum_axis(first_rows(g)) for name, g in self.samples.items()}
        name = getattr(self.function, "__qualname__", "")
        return name, frozenset(self.losses), tuple(sorted(axes.items()))

    @property
    def unused_generators(self) -> frozenset[str]:
        """The global generators that the call is known not to draw from; see UnusedGenerators."""
        return self.conditions.unused_generators.of(self.modes)

    def notice_effects(self) -> None:
        """Learn, just after the call, what it has changed."""
        self.conditions.effects.after(self.start)
        if self.generators is not None:
            self.conditions.unused_generators.after(self.generators)
            self.generators = None

    def run(self, *around: AbstractContextManager[Any]) -> Any:
        """Call the function again under the recorded random state, autocast regions and modes.

        Args:
            *around: Entered around the function alone, not around what puts its state in place.

        Returns:
            The output of the function, with an autograd graph only where that is switched on or the
            function computes gradients itself, as an inner loop does.

        Raises:
            RuntimeError: If the call changes something whose state before the call is not known,
                or an argument was changed in place after the call.
        """
        self.random.restore(self.unused_generators)
        for child, mode in zip(*self.modes, strict=True):
            if child.training is not mode:
                child.training = mode
        regions, recorded = ExitStack(), dict(self.autocast)
        with undone(autocast_state()), regions:
            for device_type in recorded.keys() | dict(autocast_regions()).keys():
                # A weight cast before the parameters moved must not be reused: no cache.
                regions.enter_context(
                    torch.autocast(
                        device_type,
                        recorded.get(device_type),
                        enabled=device_type in recorded,
                        cache_enabled=False,
                    )
                )
            effects = self.conditions.effects.replayed(self.start, self.leaves, self.modes)
            draws = self.conditions.checked(self.random, self.modes)
            with visible_functions(), effects as leaves, draws as self.lacks, ExitStack() as inner:
                for context in around:
                    inner.enter_context(context)
                if self.conditions.needs_graph:
                    inner.enter_context(torch.enable_grad())
                return _whole(self._again(leaves))

    def lacks_graph(self, error: RuntimeError) -> bool:
        """Return whether `run` failed for want of an autograd graph; from now on it has one.

        Args:
            error: What `run` raised.
        """
        had_graph = torch.is_grad_enabled() or self.conditions.needs_graph
        is_so = not had_graph and _NO_GRAPH in str(error)
        self.conditions.needs_graph |= is_so
        return is_so

    def _again(self, leaves: list[Any]) -> Any:
        if self.examples is not None:
            every, end = self.num_examples, self.examples
            leaves = [each[:end] if _is_as_long(each, every) else each for each in leaves]
        # New containers each time: some training steps pop the labels from their batch.
        if self.structure is None:
            return self.function(*leaves)
        args, kwargs = tree_unflatten(leaves, self.structure)
        return self.function(*args, **kwargs)


def is_running_again() -> bool:
    """Return whether a recorded call is being run again, of this guard or of another one."""
    # The stack cannot be left wrong by an interrupt, as a flag could.
    step: FrameType | None = sys._getframe()
    while step is not None and step.f_code is not Call._again.__code__:
        step = step.f_back
    return step is not None


def _whole(output: Any) -> Any:
    """Return an output with every part of it gathered that ranks hold pieces of."""
    leaves, structure = tree_flatten(output)
    gathered = list(map(whole, leaves))
    are_same = all(map(is_, leaves, gathered))
    return output if are_same else tree_unflatten(gathered, structure)


def _is_as_long(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == length


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
