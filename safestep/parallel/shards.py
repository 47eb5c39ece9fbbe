"""Handle parameters of which every rank holds a shard, as under ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor (a view), or the tensor itself if it is none."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor, without importing DTensor, which is slow."""
    return hasattr(tensor, "to_local")


def are_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is a DTensor.

    Args:
        tensors: The tensors.

    Returns:
        True if one is. Where all are plain tensors, none is asked by itself.
    """
    kinds = set(map(type, tensors)) - _WHOLE
    return any(hasattr(kind, "to_local") for kind in kinds)


_WHOLE = frozenset((Tensor, nn.Parameter))


def global_shape(param: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a parameter over all ranks; None where only its pieces have one.

    Args:
        param: The parameter.

    Returns:
        The shape, the same on every rank.
    """
    is_piece = getattr(param, "_fsdp_flattened", False) or hasattr(param, "_st_info")
    return None if is_piece else tuple(param.shape)


def counted_here(params: Sequence[Tensor]) -> list[bool]:
    """Return which parameters this rank adds to a sum over ranks, so that each is added once.

    Each rank adds its own shards. The first of several ranks that hold the same values adds them.

    Args:
        params: The parameters.

    Returns:
        True for every parameter that this rank adds; all of them where none is sharded.
    """
    meshes = [param.device_mesh for param in params if is_sharded(param)]  # type: ignore[attr-defined]
    if not meshes:
        return [True for _ in params]
    return [_is_first_holder(param, meshes[0]) for param in params]


def refuse_flattened(params: Sequence[Tensor]) -> None:
    """Raise if FullyShardedDataParallel flattened a parameter: no logit would see its tangent.

    Args:
        params: The parameters.

    Raises:
        RuntimeError: If FullyShardedDataParallel flattened one of them.
    """
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise RuntimeError(
            "FullyShardedDataParallel flattens the parameters, for which the radius is not "
            "measured; shard with torch.distributed.fsdp.fully_shard"
        )


def sharding_modules(module: nn.Module) -> Iterator[Any]:
    """Yield the submodules that ``fully_shard`` was applied to.

    Args:
        module: The module to look in.

    Yields:
        Each of them, from the outside to the inside.
    """
    yield from filter(_is_sharding, module.modules())


def reshard(module: nn.Module) -> None:
    """Free gathered parameters, which do not change when their shards are written to."""
    for child in sharding_modules(module):
        child.reshard()


@contextmanager
def tangents_when_gathered(module: nn.Module, tangents: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Write the tangents of sharded parameters into the gathered ones at every all-gather.

    Args:
        module: The module that ``fully_shard`` was applied to, itself or to parts of it.
        tangents: This rank's shard of the tangent of each sharded parameter.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If a parameter is a DTensor for another reason, such as tensor parallelism.
    """
    reshard(module)
    missing = dict(tangents)
    handles: list[RemovableHandle] = []
    try:
        for child in sharding_modules(module):
            places = [
                (owner, name, param, missing.pop(param))
                for owner in _own_modules(child)
                for name, param in owner.named_parameters(recurse=False)
                if param in missing
            ]
            handles.append(child.register_forward_pre_hook(_WriteTangents(places)))
        if missing:
            raise RuntimeError(
                "parameters are distributed in another way than by fully_shard alone (tensor "
                "parallelism), for which the radius is not measured"
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


class _WriteTangents:
    """A forward pre-hook that runs after the one of ``fully_shard``, which gathers."""

    def __init__(self, places: list[tuple[nn.Module, str, Any, Tensor]]) -> None:
        self._places = places

    @torch.no_grad()  # the logits are looked for with gradients on
    def __call__(self, *_: Any) -> None:
        for owner, name, param, tangent in self._places:
            gathered = getattr(owner, name)
            if is_sharded(gathered):
                raise RuntimeError("parameters stay distributed in the forward pass")
            whole = _gather(param, tangent).to(gathered)
            gathered.copy_(forward_ad.make_dual(gathered.detach(), whole))


def _gather(param: Any, shard: Tensor) -> Tensor:
    """Return the whole tensor from each rank's shard, laid out like `param`."""
    return (
        type(param)
        .from_local(
            shard, param.device_mesh, param.placements, run_check=False,
            shape=param.shape, stride=param.stride(),
        )
        .full_tensor()
    )  # fmt: skip


def _own_modules(child: nn.Module) -> Iterator[nn.Module]:
    """Walk through the submodules whose parameters `child` gathers itself."""
    yield child
    for grandchild in child.children():
        if not _is_sharding(grandchild):
            yield from _own_modules(grandchild)


def _is_sharding(module: nn.Module) -> bool:
    # fully_shard exchanges the class; asking the module itself takes longer.
    return hasattr(type(module), "reshard") and hasattr(type(module), "unshard")


def _is_first_holder(param: Any, mesh: Any) -> bool:
    if not is_sharded(param):
        return not any(mesh.get_coordinate())
    places = zip(param.placements, param.device_mesh.get_coordinate(), strict=True)
    return all(placement.is_shard() or coordinate == 0 for placement, coordinate in places)
