"""Parameters that the forward pass itself writes into: momentum encoders, normalized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safestep._torch import preserve_versions, tree_leaves
from safestep.capture.copies import bits_of, only_plain
from safestep.capture.unwinding import FunctionMode, undone
from safestep.parallel.shards import are_sharded

# Elements of a parameter that is kept before anything is known about it.
_SMALL = 2**16
# Calls that are looked at closely from the first on; after them, those at powers of two.
_CLOSE_LOOKS = 3


@dataclass(slots=True)
class Mark:
    """What the parameters were before a call.

    Attributes:
        versions: Version counter of each.
        bits: What tells whether their contents change, where the call is looked at closely.
        values: Copies of those that are not trained, as far as calls are known to move them.
    """

    versions: list[int]
    bits: list[Any] | None
    values: dict[Tensor, Tensor]


class WrittenParameters:
    """Learn which parameters a forward pass writes into, and undo that after a re-run.

    A parameter that is not trained starts the re-run from its value before the call. A trained one
    keeps, in the re-run, the value and tangent that it was given: it already holds what the call
    wrote, and the update starts from there.

    Args:
        module: The root module of the calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Where shards are gathered, what the module holds during a call are other parameters.
        self._is_sharded = are_sharded(module.parameters())
        self._params: list[Tensor] = []
        self._moved: dict[Tensor, None] = {}  # not trained
        self._held: dict[Tensor, None] = {}  # trained
        self._num_calls = 0

    def before(self, *, is_new: bool) -> Mark:
        """Return what the parameters are before a call.

        Args:
            is_new: Whether little is known about the calls of the module yet.
        """
        if is_new and not self._is_sharded:
            self._params = only_plain(p for p in self._module.parameters() if p.is_leaf)
        self._num_calls += 1
        count = self._num_calls
        is_close = count <= _CLOSE_LOOKS or count & (count - 1) == 0
        values = {param: param.detach().clone() for param in self._kept(is_new)}
        return Mark(self._versions(), bits_of(self._params) if is_close else None, values)

    def after(self, mark: Mark) -> None:
        """Learn which parameters a call has written into.

        Args:
            mark: What `before` returned for it.
        """
        versions = self._versions()
        if versions != mark.versions:
            self._learn(mark.versions, versions)
        if mark.bits is not None:
            self._learn(mark.bits, bits_of(self._params))

    @contextmanager
    def replayed(self, mark: Mark) -> Iterator[None]:
        """Let a call run again inside, without an effect on any parameter.

        Args:
            mark: What `before` returned for it.

        Raises:
            RuntimeError: If a parameter's value before the call is not known, or the re-run wrote
                into one that calls had not written into before.
        """
        unknown = [param for param in self._moved if param not in mark.values]
        if unknown:
            raise RuntimeError(self._unknown(unknown))
        versions = self._versions()
        with self._at(mark), self._holding():
            yield
        after = self._versions()
        if versions != after:
            self._learn(versions, after)
            raise RuntimeError(self._unknown(self._differing(versions, after)))

    def _kept(self, is_new: bool) -> Iterable[Tensor]:
        if not is_new:
            return self._moved
        small = (p for p in self._params if not p.requires_grad and p.numel() <= _SMALL)
        return dict.fromkeys([*self._moved, *small])

    def _versions(self) -> list[int]:
        return [param._version for param in self._params]

    def _differing(self, before: list[Any], after: list[Any]) -> list[Tensor]:
        pairs = zip(self._params, before, after, strict=True)
        return [param for param, one, other in pairs if one != other]

    def _learn(self, before: list[Any], after: list[Any]) -> None:
        if len(before) != len(after):  # other parameters since
            return
        for param in self._differing(before, after):
            (self._held if param.requires_grad else self._moved)[param] = None

    @contextmanager
    def _at(self, mark: Mark) -> Iterator[None]:
        """Put parameters that are not trained where the call found them."""
        moved = tuple(self._moved)
        now = [param.detach().clone() for param in moved]
        storages = [param.data for param in moved]

        def put_back() -> None:
            for param, storage in zip(moved, storages, strict=True):
                if param.data_ptr() != storage.data_ptr():
                    param.data = storage
            _write(moved, now)

        with preserve_versions(moved) if moved else nullcontext(), undone(put_back):
            _write(moved, (mark.values[param] for param in moved))
            yield

    @contextmanager
    def _holding(self) -> Iterator[None]:
        if not self._held:
            yield
            return
        held = _Held(tuple(self._held))
        with preserve_versions(tuple(self._held)), undone(held.put_back), held:
            yield

    def _unknown(self, params: list[Tensor]) -> str:
        names: dict[Tensor, str] = {it: name for name, it in self._module.named_parameters()}
        found = ", ".join(sorted(names.get(param, "a parameter") for param in params))
        return (
            f"the forward pass writes into {found}, which it was not seen to do before; this is "
            "taken into account from the next call on"
        )


@torch.no_grad()
def _write(params: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)


class _Held(FunctionMode):
    """Undo at once whatever is written into some parameters.

    Args:
        params: The parameters, which may carry tangents.
    """

    def __init__(self, params: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._params = params
        with torch.no_grad():
            self._values = [param.clone() for param in params]
        self._storages = [param.data for param in params]
        self._places = {storage.untyped_storage().data_ptr() for storage in self._storages}
        self._versions = [param._version for param in params]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return what the function returns."""
        result = func(*args, **(kwargs or {}))
        if self._are_touched() or (_writes(func) and self._is_ours(args)):
            self.put_back()
        return result

    def put_back(self) -> None:
        """Give the parameters the storage and the values that they had."""
        for param, storage in zip(self._params, self._storages, strict=True):
            if param.data_ptr() != storage.data_ptr():
                param.data = storage
        _write(self._params, self._values)
        self._versions = [param._version for param in self._params]

    def _are_touched(self) -> bool:
        return self._versions != [param._version for param in self._params] or any(
            param.data_ptr() != storage.data_ptr()
            for param, storage in zip(self._params, self._storages, strict=True)
        )

    def _is_ours(self, args: Any) -> bool:
        return any(
            each.untyped_storage().data_ptr() in self._places
            for each in only_plain(tree_leaves(args))
        )


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))
