from dataclasses import replace

import pytest
import torch

from arbllm.binarize.binarize import binarize_block
from arbllm.binarize.methods import METHODS, get_method
from arbllm.config import PARTITIONS
from arbllm.errors import ModelError
from arbllm.format.assemble import assemble


def parts_of(blocks):
    """The parts of the blocks, their columns numbered through the whole matrix."""
    starts = [sum(block.width for block in blocks[:index]) for index in range(len(blocks))]
    return [
        replace(part, columns=part.columns + start)
        for block, start in zip(blocks, starts, strict=True)
        for part in block.parts
    ]


def blocks_of(weight: torch.Tensor, block_size: int, method: str, **options):
    return [
        binarize_block(part, part.square(), torch.eye(part.shape[1]), get_method(method), **options).block.rounded()
        for part in weight.split(block_size, 1)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("groups", [2, 4])
def test_the_packed_matrix_dequantizes_to_the_blocks(method, partition, groups):
    weight = torch.randn(37, 75, generator=torch.Generator().manual_seed(1))
    blocks = blocks_of(weight, 32, method, partition=partition, groups=groups, iterations=3)
    matrix = assemble(parts_of(blocks), block_size=32)
    expected = torch.cat([block.reconstruct() for block in blocks], 1)
    assert torch.equal(matrix.dequantize(), expected)
    assert torch.equal(matrix.dequantize_rows(5, 9), expected[5:9])
    assert {name: (t.dtype, tuple(t.shape)) for name, t in matrix.tensors().items()} == matrix.layout.tensors()


def test_a_last_block_of_one_column_has_only_a_regular_part():
    weight = torch.randn(10, 33, generator=torch.Generator().manual_seed(2))
    blocks = blocks_of(weight, 16, "arb-rc", partition="cgb")
    assert blocks[-1].salient is None
    matrix = assemble(parts_of(blocks), block_size=16)
    assert matrix.layout.row_scale_slots == 2 * 6 + 2
    assert torch.equal(matrix.dequantize(), torch.cat([block.reconstruct() for block in blocks], 1))


def test_true_bits_count_every_stored_byte():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    matrix = assemble(parts_of(blocks_of(weight, 128, "arb-rc", partition="cgb")), block_size=128)
    salient = matrix.layout.salient
    row_scales, column_scales = 64 * 2 * 6 * 16, 16 * (2 * (256 - salient) + 4 * salient)
    bits = 2 * 64 * 256 + 256 + 64 * 8 * ((salient + 7) // 8) + row_scales + column_scales
    assert matrix.true_bits == pytest.approx(bits / (64 * 256))
    assert matrix.nominal_bits == 1 + salient / 256


def test_scales_beyond_float16_are_an_error():
    weight = 1e6 * torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    with pytest.raises(ModelError, match="does not fit float16"):
        assemble(parts_of(blocks_of(weight, 8, "arb", partition="none")))
