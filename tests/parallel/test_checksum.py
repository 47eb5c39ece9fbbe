"""Checksums: equal for equal bits, different for any other."""

import pytest
import torch

from safestep.parallel.checksum import checksum


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.complex64], ids=str
)
@pytest.mark.parametrize("size", [1, 3, 64, 1001])
def test_checksum_sees_one_changed_bit_anywhere(dtype, size):
    tensor = torch.arange(size).to(dtype)
    words = tensor.view(torch.uint8)
    reference = checksum([tensor.clone()])

    for place in range(0, len(words), max(1, len(words) // 50)):
        words[place] ^= 1
        assert not torch.equal(checksum([tensor]), reference)
        words[place] ^= 1
    assert torch.equal(checksum([tensor]), reference)


def test_checksum_does_not_depend_on_where_the_tensor_lies_in_memory():
    whole = torch.randn(101, generator=torch.Generator().manual_seed(0))

    assert torch.equal(checksum([whole[1:]]), checksum([whole[1:].clone()]))


def test_checksum_sees_exchanged_tensors():
    one, other = torch.ones(3), torch.zeros(3)

    assert not torch.equal(checksum([one, other]), checksum([other, one]))


def test_checksum_of_a_transposed_tensor_is_that_of_its_entries():
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    assert torch.equal(checksum([tensor.T]), checksum([tensor.T.contiguous()]))


def test_checksum_of_sparse_and_of_no_tensors():
    sparse = torch.eye(3).to_sparse()
    moved = torch.diag(torch.tensor([1.0, 0.0, 1.0])).to_sparse()

    assert not torch.equal(checksum([sparse]), checksum([moved]))
    assert checksum([]).tolist() == [0, 0]
