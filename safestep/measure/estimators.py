"""From a proposed update to the tangent of the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from safestep.capture import LogitFinder, Logits, LogitsFn, find_logits
from safestep.capture.call import Call
from safestep.capture.isolation import without_side_effects
from safestep.capture.wrappers import eager_module
from safestep.measure.forward_ad import differentiable_kernels, tangents_in_place
from safestep.measure.inner_radii import InnerWatch
from safestep.measure.perturb import displaced_by, moved_back
from safestep.measure.precision import is_half, run_precisely, without_autocast
from safestep.parallel.norms import joint_norm, norm_over_ranks
from safestep.parallel.shards import are_sharded, local
from safestep.radius.batch import LogitTangent
from safestep.radius.masking import absent_classes, without_absent
from safestep.radius.rows import row_spread

# Distance of a finite difference, as a share of the parameters' norm: what suits the rounding of a
# precision, and what it allows at least (some 16 units in the last place of a parameter).
_DISTANCE = {torch.float64: (1e-6, 1e-9), torch.float32: (3e-4, 1e-6)}
_DISTANCE_HALF = (2e-2, 2e-3)
# As a share of the update: the most, where the least of above allows it. Half precision rounds
# away what is smaller.
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

    Scope: any precision, any size of update. Not where an operator has no forward-mode derivative
    (it raises) nor where code keeps a view of a parameter out of the module's reach.

    Args:
        calls: The calls to run again.
        module: The root module of those calls.
        params: The trained parameters, at the point where the tangent is wanted.
        tangents: The update of each of them.
        logits: The user's way from an output to its logits.
        inside: Also looks at tangents inside the model, in the same run.

    Yields:
        Every set of logits found, with its tangent.

    Raises:
        MissingTangentError: If no tangent reaches the logits.
        LogitsNotFoundError: If the output holds nothing that enters a softmax.
    """
    undrawn = frozenset.intersection(*(call.undrawn for call in calls)) if calls else ()
    isolated = without_side_effects(module, undrawn)
    with torch.no_grad(), tangents_in_place(params, tangents, module), isolated:
        for call in calls:
            with differentiable_kernels(module), nullcontext() if inside is None else inside:
                heads = find_logits(call, logits)
            for found in heads:
                if isinstance(found.source, Tensor):
                    values, tangent = _unpacked(found.source)
                    tangent = without_absent(values, tangent)
                else:
                    values, tangent = found.source, _demanded(found.source.tangent())
                yield LogitTangent(found.name, values, tangent, found.mask)
                del tangent  # a tile of a large vocabulary goes before the next is made


def difference(
    calls: Sequence[Call],
    module: nn.Module,
    params: Sequence[Tensor],
    tangents: Sequence[Tensor],
    logits: LogitsFn | LogitFinder | None = None,
    reach: float = 1.0,
) -> Generator[LogitTangent, None, None]:
    """Yield the logits of recorded calls and a central difference quotient along the update.

    a = (z(theta + eps p) - z(theta - eps p)) / (2 eps). The quotients of the two sides differ by
    what curvature and rounding do to them: half of that is the error of each row's spread.

    Scope: any operator, any size of update, three forward passes, without autocast where that is
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
    has_changed = not any(p.any() for p in tangents)  # nothing is asked of an update of zero
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
                    yield LogitTangent(old.name, values, tangent, old.mask, error)
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
    place = partial(moved_back, params, displaced_by(list(map(local, params)), tangents, eps))
    with place():
        found = _run(call, module, finder)
    # Parameters elsewhere are held only for logits that are computed from them when asked for.
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
) -> Generator[LogitTangent, None, None]:
    """Yield the logits of recorded calls before the update, and how far the update moved them.

    a ~ z(theta + p) - z(theta).

    Scope: any operator. Within 5 % of r up to r = 1 or so, in half precision from r = 1e-2 up (less
    is lost in rounding, and r is then too large). Beyond r = 1, it saturates where logits are
    bounded in the step (normalised layers) and explodes where they are not: good for watching, not
    for deciding how far a step must shrink.

    Args:
        calls: The calls to run again.
        module: The root module of those calls.
        params: The trained parameters, after the update.
        start: Their values before it.
        logits: The user's way from an output to its logits.

    Yields:
        Every set of logits found, with its tangent.

    Raises:
        MissingTangentError: If the logits do not change though the parameters do.
        LogitsNotFoundError: If the output holds nothing that enters a softmax.
    """
    has_changed = all(map(torch.equal, map(local, params), start))
    with torch.no_grad():
        for call in calls:
            after = _run(call, module, logits)
            with moved_back(params, start):
                before = _run(call, module, logits)
            for old, new in zip(before, after, strict=True):
                values = _values(old, partial(moved_back, params, start))
                tangent = _quotient(values, _values(new), 1.0)
                has_changed |= bool(tangent.any())
                yield LogitTangent(old.name, values, tangent, old.mask)
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
        A distance that suits the precision, in lengths of the update: at most 1/128 of it and of
        the radius, or 1/2 in half precision, unless rounding of the parameters needs more. 1 where
        a length is zero, and where the parameters are in half precision: they hold no part of an
        update.

    """
    if any(is_half(param.dtype) for param in params):
        return 1.0
    # Of whole parameters, where each rank holds a shard: all must go the same distance.
    norm = partial(norm_over_ranks, params) if are_sharded(params) else joint_norm
    total, step = float(norm(params)), float(norm(tangents))
    if not 0 < step * total < math.inf:
        return 1.0
    usual, least = _DISTANCE.get(dtype, _DISTANCE_HALF)
    share, ratio = _SHARE_HALF if is_half(dtype) else _SHARE, total / step
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
        False where something random in them is not under the control of the replay.
    """
    with torch.no_grad():
        return all(
            torch.allclose(one.values, two.values, rtol=1e-3, equal_nan=True)
            for call in calls
            for one, two in zip(*(_run(call, module, logits) for _ in range(2)), strict=True)
        )


def _run(call: Call, module: nn.Module, logits: LogitsFn | LogitFinder | None) -> list[Logits]:
    # A trace of its own each time: the second run must not see what the first one left.
    with without_side_effects(module, call.undrawn):
        return find_logits(call, logits)


def _values(found: Logits, place: Callable[[], AbstractContextManager] = nullcontext) -> Tensor:
    # Logits that nobody holds are computed from the parameters: these must be in their place again.
    if isinstance(found.source, Tensor):
        return found.source.detach()
    with place():
        return found.values.detach()


def _quotient(before: Tensor, after: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(before.dtype, torch.float32)
    return without_absent(before, (after.to(wide) - before.to(wide)) / scale)


def _rounding(logits: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """Return what rounding of the logits alone may add to each row's spread in a difference."""
    absent = absent_classes(logits)  # a mask of -1e9 is no number that anything is rounded by
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
