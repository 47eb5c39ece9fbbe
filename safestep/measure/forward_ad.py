"""Parameters that carry a tangent, and kernels that let it through."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from safestep._torch import mkldnn_enabled, preserve_versions, set_mkldnn_enabled, unpack_dual
from safestep.capture.unwinding import undone
from safestep.measure.jvp_rules import TangentRules, dual_of
from safestep.parallel.shards import is_sharded, local, tangents_when_gathered


@runtime_checkable
class Written(Protocol):
    """Tangents that need less memory to be written where they belong than to be made."""

    def write(self, places: Sequence[Tensor]) -> None:
        """Write each into its place."""
        ...


@contextmanager
def tangents_in_place(
    params: Sequence[Tensor], tangents: Sequence[Tensor], module: nn.Module | None = None
) -> Iterator[None]:
    """Let every parameter carry its tangent inside, and only there.

    The dual number is written into the parameter itself: code that ties, lists or caches
    parameters then sees it too, which swapping module attributes does not achieve.

    Args:
        params: The parameters. Their values do not change.
        tangents: A tangent for each; of a sharded parameter, this rank's shard of it. If they are
            `Written`, no tangent is held twice.
        module: The module that gathers sharded parameters when it runs.

    Yields:
        Nothing.
    """
    _load_forward_ad()
    whole = tuple(param for param in params if not is_sharded(param))
    shards: dict[Tensor, Tensor] = {}
    is_written = isinstance(tangents, Written) and len(whole) == len(params)
    with (
        forward_ad.dual_level(),
        preserve_versions(whole),
        ExitStack() as stack,
    ):
        if is_written:
            tangents.write(list(map(_zero_tangent, params)))  # type: ignore[attr-defined]
        # One at a time: the copy takes the tangent too, and those given may be made as they come.
        for param, tangent in () if is_written else zip(params, tangents, strict=True):
            if is_sharded(param):
                shards[param] = local(tangent)
            else:
                param.copy_(dual_of(param.detach(), tangent.to(param)))
        if module is not None and shards:
            stack.enter_context(tangents_when_gathered(module, shards))
        yield


@contextmanager
def differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Exchange code that has no forward-mode derivative for code that computes the same and has.

    Flash attention, the encoder layers' fast path, mkldnn's LSTM, and reentrant checkpoints, which
    without this are silently wrong where their input carries no tangent.

    Args:
        module: What is going to run. mkldnn is only left out where it holds an LSTM.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_without(_ENCODER_FAST_PATH))
        if any(isinstance(child, nn.LSTM) for child in module.modules()):
            stack.enter_context(_without(_MKLDNN))
        if checkpoints := sys.modules.get("torch.utils.checkpoint"):
            stack.enter_context(_plain_calls(checkpoints.CheckpointFunction))
        stack.enter_context(TangentRules())
        yield


def _zero_tangent(param: Tensor) -> Tensor:
    """Give a parameter a tangent of zeros, which is all that is allocated.

    Returns:
        The tangent, which torch makes of the whole where an empty part gets one.
    """
    nothing = param.unsqueeze(0).narrow(0, 0, 0)
    empty = torch.empty_like(nothing.detach())
    nothing.copy_(dual_of(empty, torch.empty_like(empty)))
    return unpack_dual(param, level=0)[1]


@cache
def _load_forward_ad() -> None:
    # The first dual number of a process makes torch script its own code, which it deprecates.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


# How to ask for a switch, and how to set it. ``torch.backends.mkldnn.flags`` would set others too.
_Switch = tuple[Callable[[], bool], Callable[[bool], None]]
_ENCODER_FAST_PATH: _Switch = (
    torch.backends.mha.get_fastpath_enabled,
    torch.backends.mha.set_fastpath_enabled,
)
_MKLDNN: _Switch = (mkldnn_enabled, set_mkldnn_enabled)


@contextmanager
def _without(switch: _Switch) -> Iterator[None]:
    get, put = switch
    with undone(partial(put, get())):
        put(False)
        yield


@contextmanager
def _plain_calls(checkpoint: type[torch.autograd.Function]) -> Iterator[None]:
    def call(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)

    def undo() -> None:
        if "apply" in vars(checkpoint):
            del checkpoint.apply  # the inherited one shows again

    with undone(undo):
        checkpoint.apply = staticmethod(call)
        yield
