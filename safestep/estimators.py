"""Layer 1: from a proposed update to the tangent of the logits."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from safestep.capture import LogitsFn, find_logits
from safestep.replay import Call, eager_module, untraced


class MissingTangentError(RuntimeError):
    """The logits carry no tangent: a radius computed from them would be wrong, not infinite."""


@dataclass(frozen=True, slots=True)
class LogitTangent:
    """Logits and their tangent along the whole update.

    Attributes:
        name: Which logits.
        logits: The logits before the update. Shape ``[*B, C]``.
        tangent: Their directional derivative. Shape ``[*B, C]``, unit: logits.
        mask: True where a row counts, None if all do. Shape ``[*B]``.
    """

    name: str
    logits: Tensor
    tangent: Tensor
    mask: Tensor | None = None


def logits_jvp(
    model: nn.Module,
    tangent: Mapping[str, Tensor],
    *args: Any,
    logits: LogitsFn | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the logits of a model and their directional derivative along a parameter tangent.

    logit_tangent = J @ tangent, J = dlogits/dparameters, by forward-mode automatic differentiation
    in one forward pass. Parameters, version counters, buffers, random state, train/eval flags and
    gradients are left as they were, bit for bit.

    Args:
        model: Any module. It runs in the mode (train or eval) that it is in.
        tangent: Direction in parameter space, keyed by parameter name, each of its parameter's
            shape. Parameters that are not named stay where they are.
        *args: Positional arguments of the model.
        logits: How to get from the model's output to its logits. By default the output itself
            if it is a tensor, else its ``.logits``.
        **kwargs: Keyword arguments of the model.

    Returns:
        The logits and their tangent, each of shape ``[*B, C]``, in units of logits and of logits
        per unit of `tangent`.

    Raises:
        ValueError: If a key of `tangent` names no parameter, or a shape differs.
        TypeError: If the model returns neither a tensor nor an object with ``.logits``.
        MissingTangentError: If no tangent reaches the logits (a ``detach`` lies between, or
            `tangent` names only parameters that the logits do not depend on).

    Reference:
        Ghosts of Softmax, arXiv:2603.13552, Def. 4.4: the logit-JVP.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> tangent = {"weight": torch.tensor([[1.0, 0.0], [0.0, -1.0]])}
        >>> logits_jvp(model, tangent, torch.tensor([[3.0, 5.0]]))[1]
        tensor([[ 3., -5.]])
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, direction in tangent.items():
        if name not in params:
            raise ValueError(
                f"logits_jvp: expected the keys of `tangent` to be parameter names, got {name!r}. "
                "Use the names of model.named_parameters()."
            )
        if direction.shape != params[name].shape:
            raise ValueError(
                f"logits_jvp: expected `tangent[{name!r}]` of shape {tuple(params[name].shape)}, "
                f"got {tuple(direction.shape)}. Give one number for each parameter."
            )
    own = eager_module(model)
    unique = {id(params[name]): name for name in tangent}.values()
    with (
        torch.no_grad(),
        untraced(own),
        tangents_in_place([params[name] for name in unique], [tangent[name] for name in unique]),
    ):
        output = own(*args, **kwargs)
        values = logits(output) if logits is not None else getattr(output, "logits", output)
        if not isinstance(values, Tensor):
            raise TypeError(
                "logits_jvp: expected a model that returns a tensor or an object with `.logits`, "
                f"got {type(output).__name__}. Pass logits=lambda output: ... to pick them."
            )
        return _unpacked(values)


def jvp(
    calls: Sequence[Call],
    module: nn.Module,
    params: Sequence[Tensor],
    tangents: Sequence[Tensor],
    logits: LogitsFn | None = None,
) -> Generator[LogitTangent, None, None]:
    """Yield the logits of recorded calls and their tangents, exactly, one call at a time.

    Args:
        calls: The calls to run again.
        module: The root module of those calls.
        params: The trained parameters, at the point where the tangent is wanted.
        tangents: The update of each of them.
        logits: The user's way from an output to its logits.

    Yields:
        Every set of logits found, with its tangent.

    Raises:
        MissingTangentError: If no tangent reaches the logits.
        LogitsNotFoundError: If the output holds nothing that enters a softmax.
    """
    with torch.no_grad(), untraced(module), tangents_in_place(params, tangents):
        for call in calls:
            for found in find_logits(call, logits):
                values, tangent = _unpacked(found.values)
                yield LogitTangent(found.name, values, tangent, found.mask)


@contextmanager
def moved_back(params: Sequence[Tensor], start: Sequence[Tensor]) -> Iterator[None]:
    """Exchange the contents of `params` and `start` inside, bit for bit both ways.

    Args:
        params: The parameters, after the step.
        start: Their values before the step; holds those after it inside.

    Yields:
        Nothing.
    """
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(params)):
        _exchange(params, start)
        try:
            yield
        finally:
            _exchange(params, start)


@contextmanager
def tangents_in_place(params: Sequence[Tensor], tangents: Sequence[Tensor]) -> Iterator[None]:
    """Let every parameter carry its tangent inside, and only there.

    The dual number is written into the parameter itself: code that ties, lists or caches
    parameters then sees it too, which swapping module attributes does not achieve.

    Args:
        params: The parameters. Their values do not change.
        tangents: A tangent for each.

    Yields:
        Nothing.
    """
    _load_forward_ad()
    with (
        forward_ad.dual_level(),
        torch.autograd._unsafe_preserve_version_counter(tuple(params)),
        _differentiable_kernels(),
    ):
        for param, tangent in zip(params, tangents, strict=True):
            param.copy_(forward_ad.make_dual(param.detach(), tangent.to(param)))
        yield


@cache
def _load_forward_ad() -> None:
    # The first dual number of a process makes torch script its own code, which it deprecates.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def _differentiable_kernels() -> Iterator[None]:
    # Flash attention and the encoder's fast path have no forward-mode derivative.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _exchange(left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        kept = one.detach().clone()
        one.copy_(other)
        other.copy_(kept)


def _unpacked(values: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(values)
    if tangent is None or tangent._is_zerotensor():
        raise MissingTangentError(
            "no tangent reaches the logits: they do not depend on the parameters that moved, or "
            "the model detaches them on the way"
        )
    return primal.detach(), tangent
