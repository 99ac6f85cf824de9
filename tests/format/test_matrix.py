import pytest
import torch

from arbllm.errors import CheckpointError
from arbllm.format import matrix as matrix_module
from arbllm.format.matrix import BinaryMatrix, bitmap_order
from tests.helpers import random_matrix

MATRIX = random_matrix(37, 45, groups=4, salient=7, block_size=16, row_means=True)


def test_rows_and_tiles_are_parts_of_the_whole():
    dense = MATRIX.dequantize()
    assert torch.equal(MATRIX.dequantize_rows(5, 20), dense[5:20])
    tiles = list(MATRIX.tiles(rows=10))
    assert [(tile.start, tile.stop) for tile, _ in tiles] == [(0, 10), (10, 20), (20, 30), (30, 37)]
    assert torch.equal(torch.cat([weight for _, weight in tiles]), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_is_rounded_to_in_the_end(dtype):
    assert torch.equal(MATRIX.dequantize(dtype), MATRIX.dequantize().to(dtype))
    assert torch.equal(MATRIX.dequantize_rows(0, 9, dtype), MATRIX.dequantize_rows(0, 9).to(dtype))


def test_dequantizing_leaves_the_matrix_as_it_is():
    before = {name: tensor.clone() for name, tensor in MATRIX.tensors().items()}
    assert torch.equal(MATRIX.dequantize(), MATRIX.dequantize())
    assert all(torch.equal(tensor, before[name]) for name, tensor in MATRIX.tensors().items())


def test_more_rows_than_a_tile(monkeypatch):
    monkeypatch.setattr(matrix_module, "TILE_WEIGHTS", 10 * 20)
    matrix = random_matrix(23, 20, salient=2)
    assert [tile.stop for tile, _ in matrix.tiles()] == [10, 20, 23]
    assert torch.equal(matrix.dequantize(), matrix.dequantize_rows(0, 23))


def test_a_bitmap_puts_salient_columns_last_in_their_block():
    """Blocks of 3: one salient column, none, all."""
    salient = torch.tensor([0, 1, 0, 0, 0, 0, 1, 1]).bool()
    assert bitmap_order(salient, 3).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]


def test_tensors_round_trip():
    again = BinaryMatrix.from_tensors(MATRIX.layout, MATRIX.tensors())
    assert torch.equal(again.dequantize(), MATRIX.dequantize())
    assert list(again.tensors()) == list(MATRIX.layout.tensors())
    assert again.nbytes == sum(tensor.nbytes for tensor in MATRIX.tensors().values())
    assert again.true_bits == 8 * again.nbytes / (37 * 45)
    assert again.nominal_bits == 1 + 7 / 45
    assert again.error_history == ()


def test_map_changes_every_tensor():
    moved = MATRIX.map(lambda tensor: tensor.to("meta"))
    assert all(tensor.is_meta for tensor in moved.tensors().values())


@pytest.mark.parametrize("name", list(MATRIX.tensors()))
def test_wrong_tensors_are_named(name):
    tensors = MATRIX.tensors()
    with pytest.raises(CheckpointError, match=rf"layer\.{name}: missing"):
        BinaryMatrix.from_tensors(MATRIX.layout, {key: t for key, t in tensors.items() if key != name}, "layer")
    for wrong in (tensors[name].to(torch.int32), tensors[name][:-1]):
        with pytest.raises(CheckpointError, match=rf"layer\.{name}: expected .* found"):
            BinaryMatrix.from_tensors(MATRIX.layout, {**tensors, name: wrong}, "layer")
    with pytest.raises(CheckpointError, match=r"layer\.weight: this tensor does not belong"):
        BinaryMatrix.from_tensors(MATRIX.layout, {**tensors, "weight": tensors["signs"]}, "layer")
