"""Handle parameters of which every rank holds a shard, as under ``fully_shard``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
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


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor."""
    return list(map(local, tensors))


def whole(value: Any) -> Any:
    """Return all of a DTensor, which its ranks gather together; any other value as it is."""
    is_cut = isinstance(value, Tensor) and is_sharded(value)
    return value.full_tensor() if is_cut else value  # type: ignore[union-attr]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor, without importing DTensor, which is slow."""
    return hasattr(tensor, "to_local")


def are_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether this rank holds only a piece of any of the tensors.

    Args:
        tensors: The tensors.

    Returns:
        True for a DTensor, and for what FullyShardedDataParallel flattened or tensor parallelism
        left of one inside DistributedDataParallel. Where torch never made one, none is looked at.
    """
    if not _MAKERS.intersection(sys.modules):
        return False
    return any(is_sharded(tensor) or _is_piece(tensor) for tensor in tensors)


# What makes distributed tensors. DistributedDataParallel imports none of them.
_MAKERS = frozenset(("torch.distributed.tensor", "torch.distributed.fsdp._flat_param"))


def _is_piece(tensor: Tensor) -> bool:
    """Return whether a plain tensor is a rank's piece of a parameter."""
    return hasattr(tensor, "_st_info") or is_flattened(tensor)


def is_flattened(param: Tensor) -> bool:
    """Return whether FullyShardedDataParallel flattened a parameter."""
    return getattr(param, "_fsdp_flattened", False)


def gathered_params(module: nn.Module, *, of_pieces: bool = True) -> frozenset[Tensor]:
    """Return the parameters that ``fully_shard`` gathers when the module runs.

    Args:
        module: The module that runs.
        of_pieces: Whether to return those too that stay pieces of tensor parallelism when gathered.
    """
    return frozenset(
        param.sharded_param
        for child in sharding_modules(module)
        for group in _param_groups(child)
        for param in group.fsdp_params
        if of_pieces or not param.is_dtensor
    )


def _param_groups(child: Any) -> list[Any]:
    state = child._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def global_shape(param: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a parameter over all ranks; None where only its pieces have one.

    Args:
        param: The parameter.

    Returns:
        The shape, the same on every rank.
    """
    return None if _is_piece(param) else tuple(param.shape)


def refuse_hybrids(module: nn.Module) -> None:
    """Raise if FullyShardedDataParallel holds several copies of a flattened parameter.

    Args:
        module: The module that computes the logits.

    Raises:
        RuntimeError: If the sharding strategy is another one than FULL_SHARD and SHARD_GRAD_OP.
    """
    for handle in _flat_handles(module):
        strategy = handle._sharding_strategy.name
        if strategy not in ("FULL_SHARD", "SHARD_GRAD_OP"):
            raise RuntimeError(
                f"FullyShardedDataParallel with {strategy} is not measured; use FULL_SHARD, or "
                "shard with torch.distributed.fsdp.fully_shard"
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
    for handle in _flat_handles(module):
        handle.reshard(True)
        handle.post_reshard()


def _flat_handles(module: nn.Module) -> Iterator[Any]:
    """Yield what FullyShardedDataParallel holds the flattened parameters of each module in."""
    flat = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if flat is None:
        return
    for child in module.modules():
        if isinstance(child, flat.FullyShardedDataParallel) and child._handle is not None:
            yield child._handle


@contextmanager
def tangents_when_gathered(module: nn.Module, tangents: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Write the tangents of sharded parameters into the gathered ones at every all-gather.

    Args:
        module: The module that ``fully_shard`` was applied to, itself or to parts of it.
        tangents: This rank's shard of the tangent of each sharded parameter.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If no module gathers a parameter.
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
            raise RuntimeError("no module gathers a sharded parameter")
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
            whole = _gathered(distributed_like(param, tangent), gathered)
            gathered.copy_(forward_ad.make_dual(gathered.detach(), whole.to(gathered)))


def laid_out_like(param: Any, tensor: Tensor) -> Any:
    """Return a tensor with a parameter's type, device and distribution over the ranks."""
    return distributed_like(param, local(tensor).to(local(param)))


def distributed_like(param: Any, shard: Tensor) -> Any:
    """Return a tensor that is distributed over the ranks like a parameter.

    Args:
        param: The parameter.
        shard: This rank's shard of the tensor; all of it where the parameter is no DTensor.

    Returns:
        A DTensor, or `shard` itself.
    """
    if not is_sharded(param):
        return shard
    return type(param.detach()).from_local(
        shard, param.device_mesh, param.placements, run_check=False,
        shape=param.shape, stride=param.stride(),
    )  # fmt: skip


def _gathered(tensor: Any, like: Any) -> Any:
    """Return a distributed tensor as ``fully_shard`` gathers a parameter: whole, or a piece."""
    if not is_sharded(like):
        return tensor.full_tensor()
    from torch.distributed.tensor import Replicate  # slow: only where needed

    kept = dict(zip(like.device_mesh.mesh_dim_names, like.placements, strict=True))
    placements = [kept.get(dim, Replicate()) for dim in tensor.device_mesh.mesh_dim_names]
    piece = tensor.redistribute(placements=placements).to_local()
    return distributed_like(like, piece)


def _own_modules(child: nn.Module) -> Iterator[nn.Module]:
    """Walk through the submodules whose parameters `child` gathers itself."""
    yield child
    for grandchild in child.children():
        if not _is_sharding(grandchild):
            yield from _own_modules(grandchild)


def _is_sharding(module: nn.Module) -> bool:
    # fully_shard exchanges the class; asking the module itself takes longer.
    return hasattr(type(module), "reshard") and hasattr(type(module), "unshard")
