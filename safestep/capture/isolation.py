"""Run a module without side effects."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safestep.capture.attributes import Held, own_attributes, walk
from safestep.capture.copies import Copier, only_plain
from safestep.capture.random_state import RandomState, generators_in
from safestep.capture.unwinding import undone
from safestep.parallel.shards import reshard


@contextmanager
def without_side_effects(module: nn.Module, unused: Collection[str] = ()) -> Iterator[None]:
    """Undo, at exit, everything that a run of `module` inside changes.

    Put back are buffers (contents, bindings, version counters), attributes of every submodule
    (tensors, arrays, containers, objects, counters, train/eval flags), the storage that each
    parameter has and the state of every random generator, those in attributes included. The
    original objects are kept out of reach and copies put in their place; a view of a parameter
    becomes a fresh view of it, which carries its tangent. Compiled code runs eagerly inside.

    Not put back: objects that work on the module, as a trainer does, and effects outside of it.
    What the module writes into its parameters is put back by ``ForwardEffects``.

    Args:
        module: The root module.
        unused: Global random generators that are not drawn from inside, of "torch" and "host".
            They are left alone: other threads may draw from them meanwhile.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If the module holds an embedding that writes into its weight at every call.
    """
    within = walk(module)
    _refuse_writers(within)
    reshard(module)
    random_state = RandomState.capture(generators_in(within))
    children = [child for child, _ in within]
    saved = list(map(_Saved, children))
    params = only_plain(module.parameters())
    storages = [param.data for param in params]

    def put_back() -> None:
        torch.clear_autocast_cache()
        reshard(module)
        for each in saved:
            each.put_back()
        for param, storage in zip(params, storages, strict=True):
            if param.data_ptr() != storage.data_ptr():
                param.data = storage
        random_state.restore(unused)

    with undone(put_back):
        _put_copies(children, Copier(module))
        torch.clear_autocast_cache()
        with _eager():
            yield


class _Saved:
    """Attributes, buffers and parameters of one module, as they were."""

    def __init__(self, child: nn.Module) -> None:
        self._child = child
        self._attributes = dict(vars(child))
        self._buffers = dict(child._buffers)
        self._parameters = dict(child._parameters)

    def put_back(self) -> None:
        """Let the module have its own again."""
        _refill(vars(self._child), self._attributes)
        _rebind(self._child, self._buffers)
        if not isinstance(self._child, torch.jit.ScriptModule):
            _refill_in_order(self._child._parameters, self._parameters)


def _put_copies(children: list[nn.Module], copier: Copier) -> None:
    """Let modules work on copies of what they hold."""
    attributes = [own for _, own in own_attributes(children)]
    buffers = [dict(child._buffers) for child in children]
    copies = copier.copied([attributes, buffers])
    for child, own, table in zip(children, *copies, strict=True):
        vars(child).update(own)
        _rebind(child, table)


def _rebind(child: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    if isinstance(child, torch.jit.ScriptModule):
        for name, buffer in buffers.items():  # its table takes no other operation
            child._buffers[name] = buffer
        return
    _refill_in_order(child._buffers, buffers)


def _refill(table: dict[str, Any], content: Mapping[str, Any]) -> None:
    # Never empty in between: an interrupt would leave a module that nothing can walk.
    table.update(content)
    for name in [name for name in table if name not in content]:
        del table[name]


def _refill_in_order(table: dict[str, Any], content: Mapping[str, Any]) -> None:
    _refill(table, content)
    if list(table) != list(content):  # one was deleted and set again
        table.clear()
        table.update(content)


def _refuse_writers(within: list[Held]) -> None:
    for child, _ in within:
        if vars(child).get("max_norm") is not None and "num_embeddings" in vars(child):
            raise RuntimeError(
                f"{type(child).__name__}(max_norm={child.max_norm}) writes into its weight in "
                "every forward call, so a call cannot be run again without changing the model"
            )


@contextmanager
def _eager() -> Iterator[None]:
    # Importing dynamo takes seconds: where nothing was compiled it is not loaded.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    compiler = sys.modules["torch._dynamo.eval_frame"]
    with undone(partial(compiler._set_stance, compiler._stance)):
        torch.compiler.set_stance("force_eager")
        yield
