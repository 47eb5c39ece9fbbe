"""Estimate the tangent of the logits along a proposed update."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from safestep._torch import foreach_lerp
from safestep.capture import LogitFinder, Logits, LogitsFn, find_logits
from safestep.capture.call import Call
from safestep.capture.isolation import without_side_effects
from safestep.capture.wrappers import eager_module
from safestep.measure.forward_ad import differentiable_kernels, tangents_in_place
from safestep.measure.inner_radii import InnerWatch
from safestep.measure.perturb import displaced_by, moved_back
from safestep.measure.precision import is_half, run_precisely, without_autocast
from safestep.parallel.norms import joint_norm, norm_over_ranks
from safestep.parallel.shards import are_sharded, local_parts
from safestep.radius.batch import LogitTangent
from safestep.radius.masking import absent_classes, without_absent
from safestep.radius.rows import row_spread

# Distance of a finite difference, as a share of the parameters' norm: the usual one for a precision
# and the least it allows (about 16 units in the last place of a parameter).
_DISTANCE = {torch.float64: (1e-6, 1e-9), torch.float32: (3e-4, 1e-6)}
_DISTANCE_HALF = (2e-2, 2e-3)
# Largest distance as a share of the update, unless the least distance above is larger. Half
# precision would round a smaller share away.
_SHARE, _SHARE_HALF = 1 / 128, 1 / 2


class MissingTangentError(RuntimeError):
    """The logits carry no tangent: a radius computed from them would be wrong, not infinite."""


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
        model: Any module. It runs in its current mode, train or eval.
        tangent: Direction in parameter space, keyed by parameter name, each in the shape of its
            parameter. Parameters that are not named do not move.
        *args: Positional arguments of the model.
        logits: Function from the model's output to its logits. By default, the output's ``.logits``
            if it has them, else the output itself.
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
        tangents_in_place([params[name] for name in unique], [tangent[name] for name in unique]),
        without_side_effects(own),
        differentiable_kernels(own),
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
    logits: LogitsFn | LogitFinder | None = None,
    inside: InnerWatch | None = None,
) -> Generator[LogitTangent, None, None]:
    """Yield the logits of recorded calls and their tangents, exactly, one call at a time.

    Scope: any precision, any size of update. Not for operators without a forward-mode derivative
    (these raise), nor for code that keeps a view of a parameter outside the module.

    Args:
        calls: The calls to run again.
        module: The root module of those calls.
        params: The trained parameters, at the point where the tangent is wanted.
        tangents: The update of each of them.
        logits: The user's way from an output to its logits.
        inside: Observes tangents inside the model during the same run.

    Yields:
        Every set of logits found, with its tangent.

    Raises:
        MissingTangentError: If no tangent reaches the logits.
        LogitsNotFoundError: If the output holds nothing that enters a softmax.
    """
    unused = frozenset.intersection(*(call.unused_generators for call in calls)) if calls else ()
    isolated = without_side_effects(module, unused)
    with torch.no_grad(), tangents_in_place(params, tangents, module), isolated:
        for call in calls:
            for found in find_logits(call, logits, partial(_differentiated, module, inside)):
                if isinstance(found.source, Tensor):
                    values, tangent = _unpacked(found.source)
                    tangent = without_absent(values, tangent)
                else:
                    values, tangent = found.source, _demanded(found.source.tangent())
                yield LogitTangent(found.name, values, tangent, found.mask, loss=found.loss)
                del tangent  # frees a tile of a large vocabulary before the next one is computed


@contextmanager
def _differentiated(module: nn.Module, inside: InnerWatch | None) -> Iterator[None]:
    with differentiable_kernels(module), nullcontext() if inside is None else inside:
        yield


def difference(
    calls: Sequence[Call],
    module: nn.Module,
    params: Sequence[Tensor],
    tangents: Sequence[Tensor],
    logits: LogitsFn | LogitFinder | None = None,
    reach: float = 1.0,
) -> Generator[LogitTangent, None, None]:
    """Yield the logits of recorded calls and a central difference quotient along the update.

    a = (z(theta + eps p) - z(theta - eps p)) / (2 eps). The quotients of the two sides differ
    through curvature and rounding; half of that difference is the error of each row's spread.

    Scope: any operator, any size of update. Takes three forward passes, without autocast if
    possible. Relative error of r about 1e-3 in float32; in half precision it is what `error` says.

    Args:
        calls: The calls to run again.
        module: The root module of those calls.
        params: The trained parameters, at the point where the tangent is wanted. They are written
            to and put back, bit for bit.
        tangents: The update of each of them.
        logits: The user's way from an output to its logits.
        reach: How many radii the update is long, if that is known and over 1.

    Yields:
        Every set of logits found, with its tangent and the error of its spread.

    Raises:
        MissingTangentError: If the logits do not change though the parameters do.
        LogitsNotFoundError: If the output holds nothing that enters a softmax.
    """
    finder = logits if isinstance(logits, LogitFinder) else LogitFinder(logits)
    has_changed = not any(p.any() for p in tangents)  # a zero update need not change the logits
    with torch.no_grad():
        for call in calls:
            before, dtype, is_plain = run_precisely(call, module, params, finder)
            eps = difference_scale(params, tangents, dtype, reach)
            with without_autocast() if is_plain else nullcontext():
                ahead = _displaced(call, module, params, tangents, eps, finder)
                behind = _displaced(call, module, params, tangents, -eps, finder)
                for old, forward, backward in zip(before, ahead, behind, strict=True):
                    values = _values(old)
                    a, b = _quotient(values, forward(), eps), _quotient(values, backward(), -eps)
                    error = row_spread(a - b, None) / 2 + _rounding(values, dtype, eps)
                    tangent = a.add_(b).div_(2)
                    has_changed |= bool(tangent.any())
                    yield LogitTangent(old.name, values, tangent, old.mask, error, old.loss)
    _demand_change(has_changed)


def _displaced(
    call: Call,
    module: nn.Module,
    params: Sequence[Tensor],
    tangents: Sequence[Tensor],
    eps: float,
    finder: LogitFinder,
) -> list[Callable[[], Tensor]]:
    """Return functions that return the logits of a call at params + eps * tangents."""
    place = partial(moved_back, params, displaced_by(local_parts(params), tangents, eps))
    with place():
        found = _run(call, module, finder)
    # Displaced parameters stay in memory only for logits that are computed from them on demand.
    return [
        each.source.detach if isinstance(each.source, Tensor) else partial(_values, each, place)
        for each in found
    ]


def secant(
    calls: Sequence[Call],
    module: nn.Module,
    params: Sequence[Tensor],
    start: Sequence[Tensor],
    logits: LogitsFn | LogitFinder | None = None,
    share: float = 1.0,
) -> Generator[LogitTangent, None, None]:
    """Yield the logits of recorded calls before the update, and their change by the update.

    a ~ (z(theta + s p) - z(theta)) / s.

    Scope: any operator. Over the whole update, within 5 % of r up to about r = 1 for most rows, but
    half of r or less for some; the error shrinks with s. In half precision only from r = 1e-2 up,
    because rounding makes smaller r too large. Beyond r = 1 it saturates if the logits are bounded
    in the step (normalised layers) and explodes if they are not: good for monitoring, not for
    deciding how far a step must shrink.

    Args:
        calls: The calls to run again.
        module: The root module of those calls.
        params: The trained parameters, after the update.
        start: Their values before it.
        logits: The user's way from an output to its logits.
        share: The part s of the update that is gone.

    Yields:
        Every set of logits found, with its tangent.

    Raises:
        MissingTangentError: If the logits do not change though the parameters do.
        LogitsNotFoundError: If the output holds nothing that enters a softmax.
    """
    has_changed = all(map(torch.equal, local_parts(params), start))
    at_start, at_end = partial(moved_back, params, start), nullcontext
    with torch.no_grad():
        if share < 1:
            between = foreach_lerp(list(start), local_parts(params), share)
            at_end = partial(moved_back, params, between)
        for call in calls:
            with at_end():
                after = _run(call, module, logits)
            with at_start():
                before = _run(call, module, logits)
            for old, new in zip(before, after, strict=True):
                values = _values(old, at_start)
                tangent = _quotient(values, _values(new, at_end), share)
                has_changed |= bool(tangent.any())
                yield LogitTangent(old.name, values, tangent, old.mask, loss=old.loss)
    _demand_change(has_changed)


@torch.no_grad()
def difference_scale(
    params: Sequence[Tensor],
    tangents: Sequence[Tensor],
    dtype: torch.dtype,
    reach: float = 1.0,
) -> float:
    """Return eps, the share of the update that ``difference`` goes to each side.

    Args:
        params: The trained parameters.
        tangents: The update of each of them.
        dtype: The coarsest precision that the calls compute in.
        reach: How many radii the update is long, if that is known and over 1.

    Returns:
        A distance that suits the precision, in lengths of the update: at most 1/128 of the update
        and of the radius (1/2 in half precision), unless rounding of the parameters needs more. 1
        if a norm is zero or not finite, or if the parameters are in half precision, which rounds a
        part of an update away, unless the update is longer than the radius.
    """
    are_half = any(is_half(param.dtype) for param in params)
    if are_half and reach <= 1:
        return 1.0
    # Norms of whole parameters even if each rank holds a shard: all ranks need the same distance.
    norm = partial(norm_over_ranks, params) if are_sharded(params) else joint_norm
    total, step = float(norm(params)), float(norm(tangents))
    if not 0 < step * total < math.inf:
        return 1.0
    usual, least = _DISTANCE.get(dtype, _DISTANCE_HALF)
    share, ratio = _SHARE_HALF if is_half(dtype) else _SHARE, total / step
    if are_half:
        return min(1.0, max(share / reach, usual * ratio))
    return max(min(usual * ratio, share / reach), least * ratio)


def is_repeatable(
    calls: Sequence[Call], module: nn.Module, logits: LogitsFn | LogitFinder | None = None
) -> bool:
    """Return whether the calls give the same logits when they run twice, up to summation order.

    Args:
        calls: The calls to run again.
        module: The root module of those calls.
        logits: The user's way from an output to its logits.

    Returns:
        False if the replay does not control all randomness in the calls.
    """
    with torch.no_grad():
        return all(
            torch.allclose(one.values, two.values, rtol=1e-3, equal_nan=True)
            for call in calls
            for one, two in zip(*(_run(call, module, logits) for _ in range(2)), strict=True)
        )


def _run(call: Call, module: nn.Module, logits: LogitsFn | LogitFinder | None) -> list[Logits]:
    # Isolated anew each time: a second run must not see side effects of the first.
    with without_side_effects(module, call.unused_generators):
        return find_logits(call, logits)


def _values(found: Logits, place: Callable[[], AbstractContextManager] = nullcontext) -> Tensor:
    # Logits that are not stored are computed from the parameters, which must be back in place.
    if isinstance(found.source, Tensor):
        return found.source.detach()
    with place():
        return found.values.detach()


def _quotient(before: Tensor, after: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(before.dtype, torch.float32)
    return without_absent(before, (after.to(wide) - before.to(wide)) / scale)


def _rounding(logits: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """Return how much rounding of the logits alone may add to each row's spread."""
    absent = absent_classes(logits)  # a mask of -1e9 must not count as a logit's size
    finite = logits if absent is None else logits.masked_fill(absent, 0.0)
    size = finite.nan_to_num(neginf=0.0, posinf=0.0).abs().amax(dim=-1).float()
    return size * (torch.finfo(dtype).eps / eps)


def _demand_change(has_changed: bool) -> None:
    if not has_changed:
        raise MissingTangentError("the logits do not change along the update")


def _unpacked(values: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(values)
    return primal.detach(), _demanded(tangent)


def _demanded(tangent: Tensor | None) -> Tensor:
    if tangent is None or tangent._is_zerotensor():
        raise MissingTangentError(
            "no tangent reaches the logits: they do not depend on the parameters that moved, or "
            "the model detaches them on the way"
        )
    return tangent
