"""Carry tangents through the DTensors of tensor parallelism."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safestep._torch import have_same_size, unpack_dual
from safestep.capture.unwinding import FunctionMode, undone
from safestep.measure.jvp_rules import dual_of
from safestep.parallel.shards import is_sharded


@contextmanager
def tangents_of_dtensors() -> Iterator[None]:
    """Give DTensor's from_local, redistribute and to_local the forward-mode derivatives they lack.

    All three are linear: the tangent of the result is the result for the tangent. The other
    operators of a DTensor have torch's own derivatives. Each transfer between ranks happens twice,
    the second time for the tangent.

    Yields:
        Nothing.

    Raises:
        NotImplementedError: If this version of torch builds DTensors in an unknown way.
    """
    api = sys.modules.get("torch.distributed.tensor._api")
    if api is None:  # nothing made a DTensor
        yield
        return
    try:
        kind, handlers = api.DTensor, api.DTensor._op_dispatcher._custom_op_handlers
        functions = [api._FromTorchTensor, api._ToTorchTensor, api.Redistribute]
    except AttributeError as error:
        raise NotImplementedError(f"DTensor of torch {torch.__version__}: {error}") from error
    with ExitStack() as stack:
        for function in functions:
            stack.enter_context(
                _attribute(function, "apply", staticmethod(_linear(function.apply)))
            )
        # Where gradients are off, it returns the piece without its tangent.
        stack.enter_context(_attribute(kind, "to_local", _linear(kind.to_local)))
        # torch calls this when a tensor gets a tangent, and DTensor does not implement it.
        stack.enter_context(_item(handlers, have_same_size, lambda *_: True))
        stack.enter_context(_ZeroTangents())
        yield


class _ZeroTangents(FunctionMode):
    """Give a zero tangent to a DTensor beside one with a tangent: torch's zeros are no DTensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the result of the function."""
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        if len(values) > 1 and any(_is_dtensor(v) and _tangent(v) is not None for v in values):
            # An in-place operation must get the tensor itself.
            kept = getattr(func, "__name__", "").endswith("_")
            args = (*args[:kept], *map(_filled, args[kept:]))
            kwargs = {name: _filled(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_dtensor(value: Any) -> bool:
    return isinstance(value, Tensor) and is_sharded(value) and value.is_floating_point()


def _tangent(tensor: Tensor) -> Tensor | None:
    return unpack_dual(tensor, level=0)[1]


def _filled(value: Any) -> Any:
    if not _is_dtensor(value) or _tangent(value) is not None:
        return value
    return dual_of(value, torch.zeros_like(value))


def _linear(function: Callable[..., Any]) -> Callable[..., Any]:
    def of_dual(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not tensor.is_floating_point():
            return function(tensor, *args, **kwargs)
        primal, tangent = unpack_dual(tensor, level=0)
        if tangent is None:
            return function(tensor, *args, **kwargs)
        return dual_of(function(primal, *args, **kwargs), function(tangent, *args, **kwargs))

    return of_dual


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    undo = partial(setattr, owner, name, own) if own is not None else partial(_remove, owner, name)
    with undone(undo):
        setattr(owner, name, value)
        yield


def _remove(owner: Any, name: str) -> None:
    if name in vars(owner):
        delattr(owner, name)  # the inherited one shows again


@contextmanager
def _item(table: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    with undone(partial(table.pop, key, None)):
        table[key] = value
        yield
