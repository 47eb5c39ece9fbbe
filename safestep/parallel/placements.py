"""Tell what part of each parameter a rank holds, and how many ranks hold the same part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from safestep.parallel.shards import (
    are_sharded,
    gathered_params,
    is_flattened,
    is_sharded,
    local,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How parameters are distributed, over all dimensions of their meshes together.

    Attributes:
        sizes: Number of ranks along each dimension, by its name; empty for whole parameters.
        cut: The dimensions along which any parameter is cut.
        shard: Which part this rank holds: equal on ranks that hold the same part of everything.
        is_declared: Whether each parameter itself says that it is replicated along the others.
    """

    sizes: Mapping[Any, int]
    cut: frozenset[Any]
    shard: int
    is_declared: bool

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Layout:
        """Return the layout of parameters.

        Args:
            params: The parameters.
        """
        if any(map(is_flattened, params)):
            return cls({None: dist.get_world_size()}, frozenset((None,)), dist.get_rank(), False)
        placings = [_named(placing) for placing in map(_placing, params)]
        places = {dim: place for placing in placings for dim, place in placing.items()}
        sizes = {dim: size for dim, (size, _, _) in places.items()}
        cut = frozenset(d for placing in placings for d, (*_, is_cut) in placing.items() if is_cut)
        shard = 0
        for dim, (size, coordinate, _) in places.items():
            shard = shard * size + coordinate if dim in cut else shard
        return cls(sizes, cut, shard, all(sizes.keys() == placing.keys() for placing in placings))

    @property
    def num_ranks(self) -> int:
        """Number of ranks in the meshes of the parameters, 1 for whole parameters."""
        return prod(self.sizes.values())

    @property
    def num_shards(self) -> int:
        """Number of different parts, 1 for whole parameters."""
        return prod(self.sizes[dim] for dim in self.cut)


def shares(params: Sequence[Tensor]) -> list[float]:
    """Return the share of each parameter that this rank adds to a sum over the ranks of the meshes.

    Where several ranks hold the same values, each adds an equal share of them.

    Args:
        params: The parameters.

    Returns:
        1 over the number of ranks that hold the same, for each parameter.
    """
    if not are_sharded(params):
        return [1.0] * len(params)
    sizes = Layout.of(params).sizes
    if None in sizes:  # flattened: they are cut, and the others are whole on every rank
        return [1.0 if is_flattened(param) else 1.0 / sizes[None] for param in params]
    return [1.0 / prod(sizes[dim] for dim in sizes.keys() - _cut(param)) for param in params]


def placed_like(tensor: Any, param: Any) -> Tensor:
    """Return this rank's part of a gradient, cut as its parameter is.

    Under tensor parallelism a gradient may be whole, or still to be summed, where the parameter is
    in pieces; its ranks then redistribute it together, as the optimizer's step does.

    Args:
        tensor: The gradient.
        param: The parameter.
    """
    if is_sharded(tensor) and is_sharded(param) and tensor.placements != param.placements:
        tensor = tensor.redistribute(placements=param.placements)
    return local(tensor)


def sharding_groups(param: Tensor) -> tuple[Any, ...]:
    """Return the process groups over which a parameter is cut into shards.

    Args:
        param: The parameter.

    Returns:
        A group for each dimension of its mesh that shards it; None stands for all ranks.
    """
    if is_flattened(param):
        return (None,)
    placing = _placing(param)
    if placing is None:
        return ()
    mesh, placements = placing
    return tuple(mesh.get_group(dim) for dim, p in enumerate(placements) if _is_cut(p))


def is_tensor_parallel(params: Sequence[Tensor], module: nn.Module) -> bool:
    """Return whether ranks compute the logits together, each with its piece of a parameter.

    Args:
        params: The trained parameters.
        module: The module that computes the logits.

    Returns:
        False where ``fully_shard`` alone distributes parameters: it gathers them to compute.
    """
    gathered = gathered_params(module, of_pieces=False)
    return any(
        is_flattened(param) or (_placing(param) is not None and param not in gathered)
        for param in params
    )


def _placing(param: Any) -> Any:
    """Return the mesh and the placements of a distributed parameter, None of another one."""
    if is_sharded(param):
        return param.device_mesh, param.placements
    info = getattr(param, "_st_info", None)
    return None if info is None else (info.mesh, info.placements)


def _named(placing: Any) -> dict[Any, tuple[int, int, bool]]:
    """Return by dimension its size, this rank's coordinate, and whether it cuts the parameter."""
    if placing is None:
        return {}
    mesh, placements = placing
    names = mesh.mesh_dim_names or range(mesh.ndim)
    found = zip(names, mesh.shape, mesh.get_coordinate(), map(_is_cut, placements), strict=True)
    return {name: place for name, *place in found}  # type: ignore[misc]


def _cut(param: Tensor) -> set[Any]:
    return {dim for dim, (*_, is_cut) in _named(_placing(param)).items() if is_cut}


def _is_cut(placement: Any) -> bool:
    """Return whether a placement gives each rank another part of a tensor."""
    return not (placement.is_replicate() or placement.is_partial())
