"""Handwritten forward-mode derivatives of the operators that take most of a model's time.

torch builds them from elementwise operations, each a pass over memory, and has none for its fused
attention. Here the tangent of a linear layer takes two products and no further pass. The Jacobian
of a normalisation without weight and bias is symmetric, so its fused backward kernel also computes
its forward derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from safestep._torch import is_batched, make_dual, safe_softmax, softmax_backward, unpack_dual
from safestep.capture.unwinding import FunctionMode

# Half precision and autocast keep torch's own rules, which decide where to round.
_DTYPES = (torch.float32, torch.float64)


class TangentRules(FunctionMode):
    """Answer linear, layer_norm, batch_norm and scaled_dot_product_attention on dual tensors.

    torch handles whatever no rule covers.

    Example:
        >>> from torch.autograd import forward_ad
        >>> inputs, weight = torch.ones(1, 2), torch.ones(3, 2)
        >>> with torch.no_grad(), forward_ad.dual_level(), TangentRules():
        ...     dual = forward_ad.make_dual(weight, 2 * torch.ones(3, 2))
        ...     output = torch.nn.functional.linear(inputs, dual)
        ...     forward_ad.unpack_dual(output).tangent
        tensor([[4., 4., 4.]])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the result of the function, with its tangent."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            _refuse_another_mask(*args, **kwargs)
        rule = _RULES.get(name)
        if rule is not None and not torch.is_grad_enabled():
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if all(map(_is_plain, given)) and any(_tangent(v) is not None for v in given):
                dual = rule(*args, **kwargs)
                if dual is not None:
                    return dual_of(*dual)
        return func(*args, **kwargs)


def dual_of(primal: Tensor, tangent: Tensor) -> Tensor:
    """Return ``forward_ad.make_dual(primal, tangent)``, without its lookups at every call.

    Args:
        primal: The values.
        tangent: Their tangent.

    Returns:
        The dual tensor.
    """
    return make_dual(primal, tangent, level=_LEVEL)


_LEVEL = 0  # the only one: dual levels do not nest

Dual = tuple[Tensor, Tensor]

# Each rule takes the arguments of the torch function it is named after. It returns None for a case
# that it does not cover.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Dual | None:
    (x, dx), (w, dw), (b, db) = map(_unpacked, (input, weight, bias))
    if x.ndim < 2 or w.ndim != 2:
        return None
    output = torch.nn.functional.linear(x, w, b)
    if dx is None and dw is None:
        return output, db.expand_as(output).clone()
    first, second = (x, dw) if dx is None else (dx, w)
    tangent = torch.nn.functional.linear(first, second, db)
    if dx is not None and dw is not None:
        tangent.view(-1, len(w)).addmm_(x.reshape(-1, x.shape[-1]), dw.T)
    return output, tangent


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Dual | None:
    x, dx = _unpacked(input)
    shape = list(normalized_shape)
    unit, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    d_unit = None
    if dx is not None:
        d_unit = torch.ops.aten.native_layer_norm_backward(
            dx, x, shape, mean, rstd, None, None, [True, False, False]
        )[0]
    return _affine(unit, d_unit, _unpacked(weight), _unpacked(bias))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: object,
) -> Dual | None:
    x, dx = _unpacked(input)
    if not training or x.ndim < 2:
        return None
    unit, mean, rstd = torch.native_batch_norm(
        x, None, None, running_mean, running_var, True, momentum, eps
    )
    d_unit = None
    if dx is not None:
        d_unit = torch.ops.aten.native_batch_norm_backward(
            dx, x, None, None, None, mean, rstd, True, eps, [True, False, False]
        )[0]
    columns = (-1, *(1 for _ in x.shape[2:]))
    w, dw, b, db = (
        None if each is None else each.view(columns)
        for param in (weight, bias)
        for each in _unpacked(param)
    )
    return _affine(unit, d_unit, (w, dw), (b, db))


def _affine(
    unit: Tensor,
    d_unit: Tensor | None,
    weight: tuple[Tensor | None, Tensor | None],
    bias: tuple[Tensor | None, Tensor | None],
) -> Dual:
    """Return unit * weight + bias and its tangent; overwrites `unit`."""
    (w, dw), (b, db) = weight, bias
    if dw is not None and db is not None:  # saves one pass over memory
        tangent = torch.addcmul(db, unit, dw, out=torch.empty_like(unit))
        if d_unit is not None:
            assert w is not None
            tangent.addcmul_(d_unit, w)
    else:
        tangent = torch.zeros_like(unit) if d_unit is None else d_unit
        tangent = tangent if w is None or d_unit is None else d_unit.mul_(w)
        tangent = tangent if dw is None else tangent.addcmul_(unit, dw)
        tangent = tangent if db is None else tangent.add_(db)
    if w is not None and b is not None:
        return torch.addcmul(b, unit, w, out=unit), tangent
    output = unit if w is None else unit.mul_(w)
    return (output if b is None else output.add_(b)), tangent


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dual | None:
    if dropout_p or enable_gqa or not query.ndim == key.ndim == value.ndim == 4:
        return None
    if query.shape[:2] != key.shape[:2] or query.shape[:2] != value.shape[:2]:
        return None
    if attn_mask is not None and (is_causal or _tangent(attn_mask) is not None):
        return None
    operands = [_unpacked(operand) for operand in (query, key, value)]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    (batch, heads, length, _), columns = query.shape, key.shape[2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, length, columns)
    like, shape = operands[0][0], (*query.shape[:3], value.shape[-1])
    # Same memory layout as torch's fused kernels: models take views of the output.
    output, tangent = (
        torch.empty_like(like) if shape == like.shape else like.new_empty(shape) for _ in range(2)
    )
    # A few samples and queries at a time: all scores together would be the largest tensors of the
    # pass, a few fit in a cache, and a causal block can skip the keys after its last query.
    at_once, size = _SCORES.get(query.device.type, _SCORES_ELSEWHERE)
    samples = max(1, size // max(1, heads * min(at_once, length) * columns))
    for first in range(0, batch, samples):
        some = slice(first, first + samples)
        (q, dq), (k, dk), (v, dv) = (
            [None if each is None else each[some].flatten(0, 1) for each in operand]
            for operand in operands
        )
        for begin in range(0, length, at_once):
            rows = slice(begin, min(begin + at_once, length))
            seen = slice(min(rows.stop, columns) if is_causal else columns)
            queries = [None if each is None else each[:, rows] for each in (q, dq)]
            keys = [None if each is None else each[:, seen] for each in (k, dk, v, dv)]
            mask = None if attn_mask is None else attn_mask[some, :, rows].flatten(0, 1)
            found = _attended(queries, keys, mask, begin if is_causal else None, scale)
            for each, place in zip(found, (output, tangent), strict=True):
                place = place[some, :, rows]
                place.copy_(each.view(place.shape))
    return output, tangent


def _refuse_another_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: object,
    **__: object,
) -> None:
    """Refuse dropout if the fused kernel of the forward pass drew a mask that cannot be repeated.

    Raises:
        NotImplementedError: On a device other than the CPU.
    """
    if dropout_p and query.device.type != "cpu":
        raise NotImplementedError(
            "attention with dropout draws another mask in the kernel that has a derivative"
        )


# Queries per block and approximate scores per block; on a CPU, as many as fit in its cache.
_SCORES = {"cpu": (64, 2**16)}
_SCORES_ELSEWHERE = (256, 2**26)


def _attended(
    queries: list[Any], keys: list[Any], mask: Tensor | None, first: int | None, scale: float
) -> Dual:
    """Return the attention output of some queries and its tangent, ``[batch * heads, *, *]``.

    Args:
        queries: The queries, and their tangent or None.
        keys: Keys, their tangent or None, values, their tangent or None.
        mask: True where a query attends to a key, or a bias added to the scores; None: no mask.
        first: Index of the first query if attention is causal, else None.
        scale: Factor of the scores.
    """
    (q, dq), (k, dk, v, dv) = queries, keys
    score = torch.bmm(q * scale, k.mT)
    if mask is not None and mask.dtype == torch.bool:
        score.masked_fill_(~mask, -math.inf)
    elif mask is not None:
        score += mask
    if first is not None:
        later = score[..., first:]
        later.masked_fill_(later.new_ones(later.shape[1:], dtype=torch.bool).triu_(1), -math.inf)
    # Only an explicit mask can hide all keys from a query; handling that costs two more passes.
    share = (torch.softmax if mask is None else safe_softmax)(score, -1)
    output = torch.bmm(share, v)
    tangent = torch.zeros_like(output) if dv is None else torch.bmm(share, dv)
    if dq is not None or dk is not None:
        d_score, beta = score, 0  # reuses its memory: beta = 0 ignores the contents
        for left, right in ((dq, k), (q, dk)):
            if left is not None and right is not None:
                d_score.baddbmm_(left, right.mT, beta=beta, alpha=scale)
                beta = 1
        d_share = softmax_backward(d_score, share, -1, share.dtype)
        tangent.baddbmm_(d_share, v)
    return output, tangent


def _unpacked(value: Tensor | None) -> tuple[Any, Any]:
    if value is None:
        return None, None
    primal, tangent = unpack_dual(value, level=_LEVEL)
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


def _tangent(value: Tensor) -> Tensor | None:
    return _unpacked(value)[1]


def _is_plain(value: Tensor) -> bool:
    if is_batched(value):  # inside torch.func.vmap a tangent cannot be read
        return False
    is_known = value.dtype in _DTYPES or value.dtype == torch.bool
    is_strided = value.layout is torch.strided and type(value) in (Tensor, torch.nn.Parameter)
    return is_known and is_strided and not torch.is_autocast_enabled(value.device.type)


_RULES: dict[str, Callable[..., Dual | None]] = {
    "linear": _linear,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _scaled_dot_product_attention,
}
