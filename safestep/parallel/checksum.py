"""Checksums of tensors, to tell whether ranks hold the same bits."""

from collections.abc import Iterable

import torch
from torch import Tensor

from safestep.parallel.shards import local

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_FEW = 2**16  # words of which a sum may stay the same by accident; more take longer to mix
_MIX = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, odd, as an int64


@torch.no_grad()
def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return a checksum of the bits of all tensors, in their order.

    The bits of a tensor are summed as integers, which is as fast as a norm. Tensors that differ
    have the same sum only by a rare accident, or if their entries differ in their order alone.

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
    sums = [sum_of_words(local(tensor)) for tensor in tensors]
    if not sums:
        return torch.zeros(2, dtype=torch.float64)
    every = torch.stack([total.to(sums[0].device) for total in sums])
    # An odd factor for each place: tensors that are exchanged change the total.
    factors = torch.arange(1, 2 * len(sums), 2, device=every.device) * _MIX
    total = (every * factors + (every >> 7)).sum()
    return torch.stack([(total >> 32) & 0xFFFFFFFF, total & 0xFFFFFFFF]).double()


def sum_of_words(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's memory, read as integers as wide as fit into it.

    Args:
        tensor: A tensor of any dtype and shape.

    Returns:
        An int64 scalar on its device.
    """
    if tensor.is_sparse:
        return sum_of_words(tensor._indices()) * 3 + sum_of_words(tensor._values())
    dense = tensor.detach().contiguous()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    size, length = dense.element_size(), dense.numel() * dense.element_size()
    width = next(
        width for width in _WORDS if width == size or (width > size and not length % width)
    )
    if dense.storage_offset() * size % width:  # the words must not depend on where they lie
        dense = dense.clone()
    words = dense.view(-1).view(_WORDS[width])
    if len(words) <= _FEW:  # w + 2 w^2 is one to one: differences do not cancel as those of w may
        words = torch.add(words, words * words, alpha=2)
    return words.sum(dtype=words.dtype).long()  # overflow wraps, on every rank alike
