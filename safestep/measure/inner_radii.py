"""Observe attention scores and activation inputs, with their tangents, while a model runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from safestep.capture.unwinding import FunctionMode
from safestep.radius.inner import attention_radius, kink_radius
from safestep.radius.masking import absent_classes

RadiusName = Literal["output", "attention", "ffn"]

# ReLU-like functions: they switch units off at zero, sharply or smoothly.
_ACTIVATIONS = frozenset(("relu", "relu_", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu"))
_LOOKED_AT = _ACTIVATIONS | {"scaled_dot_product_attention", "softmax"}
# A softmax counts as attention if its result is multiplied by a matrix.
_PRODUCTS = frozenset(("matmul", "__matmul__", "bmm", "baddbmm", "einsum"))


class InnerWatch(FunctionMode):
    """Collect radii inside a model while it runs on dual numbers.

    Attention is a call of ``scaled_dot_product_attention``, or a softmax whose result is multiplied
    by a matrix. The ReLU-like functions are torch's ReLU and its leaky variants, GELU and SiLU.
    Formulas written out by hand, fused kernels and scripted modules are not seen.

    Args:
        module: The root module; it gives the layer names.
        wanted: Which radii to collect: "attention", "ffn".

    Attributes:
        wanted: The argument `wanted`.

    Example:
        >>> from safestep.measure.forward_ad import tangents_in_place
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
        >>> weight, watch = model[0].weight, InnerWatch(model, ["ffn"])
        >>> with torch.no_grad(), tangents_in_place([weight], [weight / 2]), watch:
        ...     _ = model(torch.ones(1, 1))
        >>> watch.take()
        {'ffn': {'1': tensor(2., dtype=torch.float64)}}
    """

    def __init__(self, module: nn.Module, wanted: Collection[str]) -> None:
        super().__init__()
        self._module = module
        self.wanted = wanted
        self._names: dict[int, str] = {}
        self._radii: dict[str, dict[str, Tensor]] = {}
        self._weights: Any = WeakTensorKeyDictionary()

    def take(self) -> dict[str, dict[str, Tensor]]:
        """Return the smallest radius of each layer, by kind and name, and clear them.

        Returns:
            For instance ``{"attention": {"blocks.0": radius}}``: scalars in multiples of the
            tangent. Kinds that were not seen are left out.
        """
        radii, self._radii = self._radii, {}
        return radii

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the result of the function, after inspecting its arguments."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward" and isinstance(func, FunctionType):
            with self:
                return _opened(func)(*args, **kwargs)
        # Before the call: an activation may work in place.
        is_seen = name in _LOOKED_AT and _has_numbers(args, kwargs)
        weight = self._look(name, args, kwargs) if is_seen else None
        result = func(*args, **kwargs)
        self._follow(name, weight, args, result)
        return result

    def _look(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Tensor] | None:
        """Return layer and radius of a softmax, which may be attention; store other radii."""
        if "ffn" in self.wanted and name in _ACTIVATIONS:
            self._keep("ffn", self._layer(), kink_radius(*_dual(_input(args, kwargs))))
        elif "attention" in self.wanted and name == "scaled_dot_product_attention":
            self._keep("attention", self._layer(), _radius(attention_scores(*args, **kwargs)))
        elif "attention" in self.wanted and name == "softmax":
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(axis, int):
                return self._layer(), _radius(_input(args, kwargs).movedim(axis, -1))
        return None

    def _follow(
        self, name: str, weight: tuple[str, Tensor] | None, args: tuple[Any, ...], result: Any
    ) -> None:
        """Follow the result of a softmax until it is multiplied by a matrix or discarded."""
        if weight is None:
            source = next((a for a in args if isinstance(a, Tensor) and a in self._weights), None)
            if source is None:
                return
            layer, radius = self._weights[source]
            if name in _PRODUCTS:
                self._keep("attention", layer, radius)
                return
            if not isinstance(result, Tensor) or result.numel() != source.numel():
                return
            weight = (layer, radius)
        self._weights[result] = weight

    def _keep(self, kind: str, layer: str, radius: Tensor) -> None:
        layers = self._radii.setdefault(kind, {})
        radius = radius.double()
        layers[layer] = torch.minimum(layers[layer], radius) if layer in layers else radius

    def _layer(self) -> str:
        """Return the name of the innermost submodule whose code is running."""
        if not self._names:
            self._names = {id(child): name for name, child in self._module.named_modules()}
        frame = sys._getframe(1)
        while frame is not None:
            name = self._names.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name or type(self._module).__name__
            frame = frame.f_back
        return type(self._module).__name__


def inner_watch(module: nn.Module, radii: Collection[RadiusName]) -> InnerWatch | None:
    """Return a watch for the requested radii, None if only "output" is requested.

    Args:
        module: The root module of the calls that run again.
        radii: Any of "output", "attention", "ffn".

    Returns:
        The watch.

    Raises:
        ValueError: If `radii` is a string or holds an unknown name.
    """
    unknown = [radius for radius in radii if radius not in get_args(RadiusName)]
    if unknown or isinstance(radii, str):
        raise ValueError(
            "SafeStep: expected `radii` to hold some of 'output', 'attention' and 'ffn', got "
            f"{radii!r}. ('output', 'attention') also logs the radius of attention's softmax."
        )
    wanted = [radius for radius in radii if radius != "output"]
    return InnerWatch(module, wanted) if wanted else None


def attention_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the numbers that enter the softmax of ``scaled_dot_product_attention``.

    Args:
        query: Queries. Shape ``[*B, Q, E]``.
        key: Keys. Shape ``[*B, K, E]``.
        value: Not used; the signature is that of the torch function.
        attn_mask: True where a query may attend to a key, or a bias. Broadcasts to the scores.
        dropout_p: Not used.
        is_causal: Whether query i attends only to keys up to i.
        scale: Factor of the products, 1 / sqrt(E) by default.
        enable_gqa: Whether several query heads share a key head.

    Returns:
        The scores, -inf where masked. Shape ``[*B, Q, K]``; they carry a tangent if queries, keys
        or the bias do.

    Example:
        >>> attention_scores(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4), is_causal=True)
        tensor([[2., -inf],
                [2., 2.]])
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask


def _radius(scores: Tensor) -> Tensor:
    scores, tangent = _dual(scores)
    absent = absent_classes(scores)
    return attention_radius(tangent, mask=None if absent is None else ~absent)


def _dual(values: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(values)
    return primal.detach(), torch.zeros_like(primal) if tangent is None else tangent.detach()


def _has_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether there is anything to measure; an expert without tokens has empty inputs."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return bool(tensors) and tensors[0].is_floating_point() and all(map(Tensor.numel, tensors))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _opened(function: FunctionType) -> FunctionType:
    """Return a torch function whose inner calls are visible to a mode.

    ``multi_head_attention_forward`` checks whether a mode is on and, if so, dispatches as a whole.
    """
    unasked = {**function.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(
        function.__code__, unasked, function.__name__, function.__defaults__, function.__closure__
    )
