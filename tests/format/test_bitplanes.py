import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.format.bitplanes import pack, unpack, unpack_values


@given(shape=st.lists(st.integers(1, 4), max_size=2), length=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_unpack_undoes_pack(shape, length, seed):
    bits = torch.rand(*shape, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, length), bits)
    assert torch.equal(packed, torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little")))


def test_bit_order():
    bits = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 1]).bool()
    assert pack(bits).tolist() == [0x19, 0x02]


@pytest.mark.parametrize(("clear", "set"), [(0, 1), (-1, 1), (0, -1)])
def test_values(clear, set):
    bits = torch.rand(3, 2, 19) < 0.5
    values = unpack_values(pack(bits), 19, clear, set)
    assert values.dtype == torch.int8
    assert torch.equal(values, torch.where(bits, set, clear).to(torch.int8))


def test_unpacking_a_slice_of_rows():
    bits = torch.rand(6, 3, 11) < 0.5
    assert torch.equal(unpack(pack(bits)[2:4, 1], 11), bits[2:4, 1])


def test_the_table_of_bytes_outlives_inference_mode():
    with torch.inference_mode():
        unpack_values(pack(torch.ones(8).bool()), 8, 3, 5)
    weight = torch.ones(8, requires_grad=True)
    (weight * unpack_values(pack(torch.ones(8).bool()), 8, 3, 5)).sum().backward()
    assert weight.grad.tolist() == [5.0] * 8
