"""Give parameters a tangent, and use kernels that propagate it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend

from safestep._torch import (
    attention_kernels,
    mkldnn_enabled,
    preserve_versions,
    set_attention_kernels,
    set_mkldnn_enabled,
    unpack_dual,
)
from safestep.capture.unwinding import undone
from safestep.measure.dtensors import tangents_of_dtensors
from safestep.measure.jvp_rules import TangentRules, dual_of
from safestep.parallel.shards import (
    are_sharded,
    gathered_params,
    laid_out_like,
    local,
    tangents_when_gathered,
)


@runtime_checkable
class Written(Protocol):
    """Tangents that take less memory if they are written directly to their destination."""

    def write(self, places: Sequence[Tensor]) -> None:
        """Write each tangent into its place."""
        ...


@contextmanager
def tangents_in_place(
    params: Sequence[Tensor], tangents: Sequence[Tensor], module: nn.Module | None = None
) -> Iterator[None]:
    """Give every parameter its tangent within the context, and only there.

    The dual number is written into the parameter itself, so code that ties, lists or caches
    parameters sees it too. Swapping module attributes would not achieve that.

    Args:
        params: The parameters. Their values do not change.
        tangents: A tangent for each; for a sharded parameter, this rank's shard. If they are
            `Written`, no tangent is stored twice.
        module: The module that gathers sharded parameters when it runs.

    Yields:
        Nothing.
    """
    _load_forward_ad()
    has_shards = are_sharded(params)
    gathered = gathered_params(module) if has_shards and module is not None else frozenset()
    own = tuple(param for param in params if param not in gathered)
    shards: dict[Tensor, Tensor] = {}
    with (
        forward_ad.dual_level(),
        preserve_versions(own),
        tangents_of_dtensors() if has_shards else nullcontext(),
        ExitStack() as stack,
    ):
        if isinstance(tangents, Written) and not has_shards:
            tangents.write(list(map(_zero_tangent, params)))
        else:
            # One at a time: a lazy sequence computes each, and copy_ keeps a copy of the tangent.
            for param, tangent in zip(params, tangents, strict=True):
                if param in gathered:
                    shards[param] = local(tangent)
                else:
                    param.copy_(dual_of(param.detach(), laid_out_like(param, tangent)))
        if module is not None and shards:
            stack.enter_context(tangents_when_gathered(module, shards))
        yield


@contextmanager
def differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Replace code without a forward-mode derivative by equivalent code that has one.

    This covers flash attention, the fast path of encoder layers, mkldnn's LSTM, and reentrant
    checkpoints, which would be silently wrong if their input carries no tangent.

    Args:
        module: The module that will run. mkldnn is disabled only if it contains an LSTM.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(_set(_ATTENTION, [SDPBackend.MATH]))
        stack.enter_context(_set(_ENCODER_FAST_PATH, False))
        if any(isinstance(child, nn.LSTM) for child in module.modules()):
            stack.enter_context(_set(_MKLDNN, False))
        if checkpoints := sys.modules.get("torch.utils.checkpoint"):
            stack.enter_context(_plain_calls(checkpoints.CheckpointFunction))
        stack.enter_context(TangentRules())
        yield


def _zero_tangent(param: Tensor) -> Tensor:
    """Give a parameter a tangent of zeros and allocate nothing else.

    Returns:
        The tangent. torch allocates it for the whole tensor when an empty view of it gets one.
    """
    nothing = param.unsqueeze(0).narrow(0, 0, 0)
    empty = torch.empty_like(nothing.detach())
    nothing.copy_(dual_of(empty, torch.empty_like(empty)))
    return unpack_dual(param, level=0)[1]


@cache
def _load_forward_ad() -> None:
    # On the first dual number of a process torch scripts its own code and warns of deprecation.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


# Getter and setter of a switch. ``torch.backends.mkldnn.flags`` would set other switches too.
_Switch = tuple[Callable[[], Any], Callable[[Any], None]]
_ENCODER_FAST_PATH: _Switch = (
    torch.backends.mha.get_fastpath_enabled,
    torch.backends.mha.set_fastpath_enabled,
)
_MKLDNN: _Switch = (mkldnn_enabled, set_mkldnn_enabled)
_ATTENTION: _Switch = (attention_kernels, set_attention_kernels)


@contextmanager
def _set(switch: _Switch, value: Any) -> Iterator[None]:
    get, put = switch
    with undone(partial(put, get())):
        put(value)
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
