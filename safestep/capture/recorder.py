"""Record the calls an update was computed from, and run them again without a trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from safestep._warn import warn_user
from safestep.capture.gradient import GradientEvidence
from safestep.capture.hooks import DetachableHook, hook_gradient
from safestep.capture.isolation import RandomState
from safestep.capture.plan import named_tensors
from safestep.capture.random_state import Modes, Surroundings
from safestep.parallel.norms import each_norm
from safestep.parallel.shards import is_sharded

# More micro-batches than anyone accumulates: beyond this, the optimizer that steps is another one.
MAX_RECORDED_CALLS = 1024
# Elements of a gradient that is cheaper to keep than to look at.
_SMALL = 2**16


@dataclass(slots=True, eq=False)
class Call:
    """One call that took part in an update: what ran, on what, in which surroundings.

    Attributes:
        function: What to call again.
        leaves: What its arguments are made of, detached.
        structure: How they are made of it; None where they are positional and tensors.
        random: Random state just before the call, so that dropout draws the same mask.
        autocast: ``(device type, dtype)`` of every autocast region around the call.
        versions: Version counter of each tensor argument, to notice a change in place.
        modes: Every submodule, and which of them were in train mode.
        surroundings: Where `random` and `modes` come from, to check them when the call runs again.
        lacks: Where it was seen to draw from, when it ran again, that is not in `random`.
        unread: What tells what a gradient shows, by the name of its output tensor, where nobody
            has asked yet.
        signals: What has a 2-norm that tells unusual data from usual, where a Recorder watches it:
            smallest and largest output, and the loss's gradient there or its norm; of a call that
            it was told of, whose output is the loss, the largest input.
        is_fresh: Whether every gradient was zero when its backward pass began: a boolean on the
            device, or None where that is known without a look at the numbers.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    structure: TreeSpec | None
    random: RandomState
    autocast: tuple[tuple[str, torch.dtype], ...]
    versions: tuple[int, ...]
    modes: Modes
    surroundings: Surroundings
    lacks: list[str] = field(default_factory=list)
    unread: dict[str, Callable[[], GradientEvidence]] = field(default_factory=dict)
    signals: list[Tensor] = field(default_factory=list)
    is_fresh: Tensor | None = None
    _gradients: dict[str, GradientEvidence] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        surroundings: Surroundings,
    ) -> Call:
        """Return the description of a call that is about to happen."""
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, structure = tree_flatten((args, kwargs))
        else:
            leaves, structure = args, None
        leaves = list(map(_detached, leaves))
        random, modes = surroundings.record()
        return cls(
            function, leaves, structure, random, _autocast_regions(), _versions(leaves), modes,
            surroundings,
        )  # fmt: skip

    @property
    def gradients(self) -> dict[str, GradientEvidence]:
        """What the loss's gradient showed about each output tensor, by its name."""
        while self.unread:
            name, read = self.unread.popitem()
            self._gradients[name] = read()
        return self._gradients

    def run(self) -> Any:
        """Call again in the recorded surroundings: random state, autocast regions, train mode.

        Returns:
            What the function returns.

        Raises:
            RuntimeError: If an argument was changed in place since the call.
        """
        if _versions(self.leaves) != self.versions:
            raise RuntimeError(
                "an input of the model was changed in place between its forward pass and the step"
            )
        self.random.restore()
        for child, mode in zip(*self.modes, strict=True):
            if child.training is not mode:
                child.training = mode
        regions, recorded = ExitStack(), dict(self.autocast)
        with regions:
            for device_type in recorded.keys() | dict(_autocast_regions()).keys():
                # A weight cast before the parameters moved must not be reused: no cache.
                regions.enter_context(
                    torch.autocast(
                        device_type,
                        recorded.get(device_type),
                        enabled=device_type in recorded,
                        cache_enabled=False,
                    )
                )
            with self.surroundings.checked(self.random, self.modes) as self.lacks:
                return self._again()

    def _again(self) -> Any:
        # New containers each time: some training steps pop the labels from their batch.
        leaves = map(_detached, self.leaves)
        if self.structure is None:
            return self.function(*leaves)
        args, kwargs = tree_unflatten(leaves, self.structure)
        return self.function(*args, **kwargs)


class Recorder:
    """Keep the grad-enabled forward calls that the next update is computed from.

    A call enters the queue when a gradient flows back through its output, so that a forward pass
    for logging or evaluation is neither re-run nor kept in memory.

    Args:
        model: The module that runs again. A DistributedDataParallel wrapper is looked through: a
            re-run must not broadcast buffers.
        params: Trained parameters; where all their gradients are None, a new update begins.
        part: The submodule whose forward calls are recorded, by default `model` itself.
        watches: Whether to note the sizes of outputs and of their gradients with each call.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Callable[[], list[Tensor]],
        *,
        part: nn.Module | None = None,
        watches: bool = False,
    ) -> None:
        self.module = eager_module(model)
        self._part = self.module if part is None else eager_module(part)
        self._params = params
        self._watches = watches
        self._calls: deque[Call] = deque(maxlen=MAX_RECORDED_CALLS)
        self._opened: Call | None = None
        self._backward = -1  # torch's number of the backward pass that queued the latest call
        self._step_start: tuple[int, ...] | None = None
        self._class_axes: dict[str, int] = {}
        self._surroundings = Surroundings(self.module)
        target = without_data_parallel(model if part is None else part)
        if isinstance(target, torch.jit.ScriptModule):
            raise TypeError(
                "SafeStep: expected a `model` that takes forward hooks, got a ScriptModule. Put it "
                "into a module that does: torch.nn.Sequential(model)."
            )
        self._handles = (
            target.register_forward_pre_hook(DetachableHook(self._before), with_kwargs=True),
            target.register_forward_hook(DetachableHook(self._after), with_kwargs=True),
        )

    def record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        """Queue a call that is about to happen, such as a training step that returns the loss.

        From the first such call on, forward calls of the module are no longer recorded.

        Args:
            function: What is going to be called.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The recorded call.
        """
        for handle in self._handles:  # in a compiled training step they would break the graph
            handle.remove()
        self._opened = None
        call = Call.of(function, args, kwargs, self._surroundings)
        if self._watches:
            call.signals += _largest(call.leaves)
        self._queue(call)
        return call

    def begin_step(self) -> None:
        """Until `take`, record calls only while the parameters are where they are now.

        An optimizer like LBFGS evaluates its closure again at other parameters; what the gradient
        shows there (rows that are fitted, rows that count) is not so at the start of the step.
        """
        self._step_start = _versions(self._params())

    def take(self) -> list[Call]:
        """Return the queued calls and forget them."""
        calls = _since_cleared(list(self._calls))
        self._calls.clear()
        self._step_start = None
        return calls

    def detach(self) -> None:
        """Remove the hooks and forget the queue."""
        for handle in self._handles:
            handle.remove()
        self._calls.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._opened = None
        if not torch.is_grad_enabled():
            return
        if self._step_start is not None and self._step_start != _versions(self._params()):
            return
        self._void_cleared()
        self._opened = Call.of(self._part, args, kwargs, self._surroundings)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, self._opened = self._opened, None
        if call is None:
            return
        for name, tensor in named_tensors(output):
            if not tensor.is_leaf:
                # Held until the gradient comes, and only before anything is known about it.
                output = None if name in self._class_axes else tensor.detach()
                hook_gradient(tensor, self._on_gradient(call, name, output))
                if self._watches:
                    call.signals += tensor.detach().aminmax()

    def _on_gradient(
        self, call: Call, name: str, output: Tensor | None
    ) -> Callable[[Tensor | None], None]:
        def look(gradient: Tensor | None) -> None:
            if gradient is None:  # of a compiled graph's output that the loss does not depend on
                return
            if call not in self._calls:
                call.is_fresh = self._void_cleared()
                self._queue(call)
            if gradient.numel() > _SMALL:
                call.gradients[name] = self._evidence(name, gradient, output)
                signals = each_norm([gradient.detach()]) if self._watches else ()
            else:  # a copy of which is read when the call runs again
                kept = gradient.detach().clone()
                values = None if output is None else output.clone()
                call.unread[name] = partial(self._evidence, name, kept, values)
                signals = (kept,)
            if self._watches:
                call.signals += signals

        return look

    def _evidence(self, name: str, gradient: Tensor, output: Tensor | None) -> GradientEvidence:
        evidence = GradientEvidence.of(gradient, self._class_axes.get(name), output)
        if evidence.class_axis is not None:
            self._class_axes[name] = evidence.class_axis
        return evidence

    def _void_cleared(self) -> Tensor | None:
        """Forget calls whose gradients were cleared without a step.

        A GradScaler found inf, or the gradients were those of another optimizer's loss.

        Returns:
            Whether the gradients are all zero, as ``zero_grad(set_to_none=False)`` leaves them: a
            boolean on the device, since to wait for it would hold up the backward pass. None where
            nothing is to be voided, and for sharded and sparse gradients, which are not looked at.
        """
        backward = torch._C._current_graph_task_id()  # its gradients come when it ends; -1 outside
        is_new = backward != self._backward or backward == -1
        self._backward = backward
        if not is_new or not self._calls:
            return None
        params = self._params()
        if not any(_has_gradient(p) for p in params):
            self._calls.clear()
            return None
        grads = [p.grad for p in params if p.grad is not None and p.grad.numel()]
        if backward == -1 or any(is_sharded(grad) or grad.is_sparse for grad in grads):
            return None
        return _are_zero(grads) if grads else None

    def _queue(self, call: Call) -> None:
        if len(self._calls) == MAX_RECORDED_CALLS:
            warn_user(
                f"SafeStep: {MAX_RECORDED_CALLS} forward passes were recorded and the optimizer it "
                "is attached to never stepped. A copied or re-created optimizer has lost its "
                "hooks: attach SafeStep to the optimizer whose step() is called."
            )
            self._calls.clear()
        self._calls.append(call)


def without_data_parallel(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and Fabric wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_forward_module", None), nn.Module):
            model = inner  # of Lightning Fabric, with DistributedDataParallel inside
        else:
            return model


def eager_module(model: nn.Module) -> nn.Module:
    """Return the user's own module, inside data-parallel and torch.compile wrappers."""
    model = without_data_parallel(model)
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = without_data_parallel(original)
    return model


def _has_gradient(param: Tensor) -> bool:
    # fully_shard holds a gradient that is not reduced yet elsewhere: there may be one.
    return param.grad is not None or is_sharded(param)


@torch.no_grad()
def _are_zero(grads: list[Tensor]) -> Tensor:
    # A 2-norm of tiny numbers would underflow; on a CPU an inf-norm takes twenty times as long.
    ends = [end.to(grads[0].device) != 0 for grad in grads for end in grad.aminmax()]
    return ~torch.stack(ends).any()


@torch.no_grad()
def _largest(leaves: Iterable[Any]) -> list[Tensor]:
    """Return the size of the largest number among tensors; nothing if there is none."""
    ends = [
        end.float()
        for leaf in leaves
        if type(leaf) is Tensor and leaf.dtype in _FLOATS and leaf.layout is torch.strided
        if leaf.numel() and not (leaf.is_nested or leaf.is_meta)
        for end in leaf.aminmax()
    ]
    return [torch.stack([end.to(ends[0].device) for end in ends]).abs().amax()] if ends else []


_FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


def _since_cleared(calls: list[Call]) -> list[Call]:
    """Return the calls from the last one on whose backward began with zero gradients."""
    starts = [index for index, call in enumerate(calls) if call.is_fresh is not None]
    if not starts:
        return calls
    flags = torch.stack([calls[index].is_fresh for index in starts]).tolist()  # type: ignore[arg-type]
    return calls[max(compress(starts, flags), default=0) :]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _versions(leaves: Iterable[Any]) -> tuple[int, ...]:
    return tuple(
        leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()
    )


def _autocast_regions() -> tuple[tuple[str, torch.dtype], ...]:
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple(
        (device_type, torch.get_autocast_dtype(device_type))
        for device_type in ("cpu", "cuda")
        if torch.is_autocast_enabled(device_type)
    )
