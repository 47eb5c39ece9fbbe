"""Hooks that stay out of copies, pickles and compiled code; their errors stay out of training."""

from __future__ import annotations

import copyreg
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import nn

from safestep._warn import RaisedOnPurpose

# The tables of a module that hold its forward hooks, and those that tell how to call them.
_TABLES = {
    "_forward_pre_hooks": "_forward_pre_hooks_with_kwargs",
    "_forward_hooks": "_forward_hooks_with_kwargs",
}


class DetachableHook:
    """A hook that does nothing in a copy of what it is on.

    Otherwise a copy or a pickle would hold the hook's owner: the controller, the optimizer and its
    state. What takes its place is a function of Python's own that returns None.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        # A compiled optimizer step or model must not trace the guard.
        self._uncompiled = torch.compiler.disable(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the function."""
        function = self._uncompiled if torch.compiler.is_compiling() else self._function
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (nullcontext(), "__exit__")


class ModuleHooks:
    """Forward hooks on a module, which copies and pickles of it do not have.

    Args:
        module: The module.
        before: A forward pre-hook that takes keyword arguments too.
        after: A forward hook that takes keyword arguments too.
    """

    def __init__(
        self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]
    ) -> None:
        self._handles = (
            module.register_forward_pre_hook(DetachableHook(before), with_kwargs=True),
            module.register_forward_hook(DetachableHook(after), with_kwargs=True),
        )
        _hide_hooks_of(type(module))
        self._show = weakref.finalize(module, _show_hooks_of, type(module))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._show()


_hooked: Counter[type] = Counter()


def _hide_hooks_of(kind: type) -> None:
    _hooked[kind] += 1
    # Asked by copy.copy, copy.deepcopy, pickle and torch.save, before any method of the class.
    if copyreg.dispatch_table.setdefault(kind, _reduced) is not _reduced:
        _hooked.pop(kind)  # the user reduces it in another way


def _show_hooks_of(kind: type) -> None:
    _hooked[kind] -= 1
    if _hooked[kind] <= 0:
        del _hooked[kind]
        if copyreg.dispatch_table.get(kind) is _reduced:
            del copyreg.dispatch_table[kind]


def _reduced(module: nn.Module) -> Any:
    """Return what a module is copied from, as its class says, without our hooks."""
    reduced = module.__reduce_ex__(2)
    return reduced if isinstance(reduced, str) else tuple(map(_without_hooks, reduced))


def _without_hooks(part: Any) -> Any:
    """Return the arguments or the state of a copy without our hooks."""
    if type(part) is tuple:
        return tuple(map(_without_hooks, part))
    if not (isinstance(part, dict) and _TABLES.keys() <= part.keys()):
        return part
    state = part.copy()
    for name, flags in _TABLES.items():
        hooks = state[name]
        ours = {key for key, hook in hooks.items() if isinstance(hook, DetachableHook)}
        for table in (name, flags):
            kept = [(key, item) for key, item in state[table].items() if key not in ours]
            state[table] = type(state[table])(kept)
    return state


def kept_out(
    function: Callable[..., Any], failed: Callable[[BaseException], None]
) -> Callable[..., Any]:
    """Return a function whose errors stay out of training.

    Args:
        function: What to call.
        failed: Told of each error. Those for which ``is_passed_on`` are raised after it.

    Returns:
        A function that returns None where `function` failed.

    Example:
        >>> kept_out(lambda: 1 / 0, print)()
        division by zero
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        has_graph = torch.is_grad_enabled()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            torch.set_grad_enabled(has_graph)  # an interrupt may skip the exit of no_grad
            with suppress(Exception):
                failed(error)
            if is_passed_on(error):
                raise
            return None

    return call


class StepHook(DetachableHook):
    """A hook on an optimizer's step, which marks the optimizer as one with a SafeStep.

    Args:
        function: What to call.
        failed: Also told of an interrupt that comes just before `function` can catch it.
    """

    def __init__(
        self, function: Callable[..., Any], failed: Callable[[BaseException], None]
    ) -> None:
        super().__init__(kept_out(function, failed))
        self._failed = failed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the function."""
        try:
            return super().__call__(*args, **kwargs)
        except BaseException as error:
            with suppress(Exception):
                self._failed(error)
            raise


def is_passed_on(error: BaseException) -> bool:
    """Return whether an error is meant for the training loop.

    Args:
        error: The error.

    Returns:
        True for interrupts (KeyboardInterrupt, SystemExit), for warnings that the user turned into
        errors, and for what the guard raises on purpose.
    """
    return not isinstance(error, Exception) or isinstance(error, (Warning, RaisedOnPurpose))
