"""Let torch-function modes see the ``torch.autograd.Function`` classes that compute losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

from safestep.capture.losses import LOSS_FUNCTIONS
from safestep.capture.unwinding import undone


@contextmanager
def visible_functions() -> Iterator[None]:
    """Let the registered classes call the torch-function modes that are on, as torch's own do.

    ``Function.apply`` asks no mode by itself.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for function in Function.__subclasses__():
            name = f"{function.__module__}.{function.__qualname__}"
            if name in LOSS_FUNCTIONS:
                stack.enter_context(_visible(function, name))
        yield


@contextmanager
def _visible(function: type[Function], name: str) -> Iterator[None]:
    hidden = function.apply

    def apply(*args: Any) -> Any:
        if has_torch_function(tuple(arg for arg in args if isinstance(arg, Tensor))):
            return handle_torch_function(apply, args, *args)
        return hidden(*args)

    apply.__name__ = name
    visible: Callable[..., Any] = staticmethod(apply)  # type: ignore[assignment]

    def undo() -> None:
        if vars(function).get("apply") is visible:
            del function.apply  # the inherited one shows again

    with undone(undo):
        function.apply = visible  # type: ignore[method-assign, assignment]
        yield
