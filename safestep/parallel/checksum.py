"""Checksums of tensors, to tell whether ranks hold the same bits."""

from collections.abc import Iterable

import torch
from torch import Tensor

from safestep.parallel.shards import local

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_MIX = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, odd, as an int64


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return a checksum of the bits of all tensors, in their order.

    The bits of a tensor are summed as integers, which is as fast as a norm. Two tensors that differ
    in any bit have the same sum only by a rare accident; so have two that differ in the order of
    their entries.

    Args:
        tensors: Tensors of any dtype and shape; of sharded ones, this rank's part counts.

    Returns:
        Two integers below 2^32, in float64 and on the device of the first tensor. Shape ``[2]``.

    Example:
        >>> one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.0 + 2.0**-23])
        >>> torch.equal(checksum([one]), checksum([torch.ones(3)]))
        True
        >>> torch.equal(checksum([one]), checksum([other]))
        False
    """
    sums = [_sum_of_words(local(tensor)) for tensor in tensors]
    if not sums:
        return torch.zeros(2, dtype=torch.float64)
    every = torch.stack([total.to(sums[0].device) for total in sums])
    # An odd factor for each place: tensors that are exchanged change the total.
    factors = torch.arange(1, 2 * len(sums), 2, device=every.device) * _MIX
    total = (every * factors + (every >> 7)).sum()
    return torch.stack([(total >> 32) & 0xFFFFFFFF, total & 0xFFFFFFFF]).double()


def _sum_of_words(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's memory, read as integers as wide as fit into it."""
    if tensor.is_sparse:
        return _sum_of_words(tensor._indices()) * 3 + _sum_of_words(tensor._values())
    dense = tensor.detach().contiguous()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    size = dense.element_size()
    offset, length = dense.storage_offset() * size, dense.numel() * size
    width = next(width for width in _WORDS if not (offset % width or length % width))
    words = dense.view(-1).view(_WORDS[width] if width >= size else _WORDS[size])
    return words.sum(dtype=words.dtype).long()  # overflow wraps, on every rank alike
