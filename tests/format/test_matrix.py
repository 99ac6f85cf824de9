import pytest
import torch

from arbllm.errors import CheckpointError
from arbllm.format import matrix as matrix_module
from arbllm.format.bitplanes import pack
from arbllm.format.matrix import ORDER_TENSORS, BinaryMatrix, bitmap_order, check_order, segment_numbers
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


@pytest.mark.parametrize("ordering", ["natural", "bitmap", "segments", "explicit"])
def test_natural_columns_are_stored_columns_put_in_order(ordering):
    matrix = random_matrix(9, 45, salient=7, block_size=16, ordering=ordering)
    order = matrix.column_order()
    if order is None:
        order = torch.arange(45)
    assert (ordering == "natural") == (matrix.column_order() is None)
    stored = torch.cat([weight for _, weight in matrix.stored_tiles(rows=4)])
    assert torch.equal(matrix.dequantize()[:, order], stored)
    assert torch.equal(matrix.dequantize_rows(2, 5)[:, order], stored[2:5])


def test_columns_of_a_segment_stay_in_order():
    numbers = torch.tensor([2, 0, 1, 0, 2, 1])
    planes = pack(torch.stack([numbers & 1, numbers >> 1]).bool())
    assert segment_numbers(planes, 6).tolist() == numbers.tolist()


@pytest.mark.parametrize(
    ("ordering", "spoil"),
    [
        ("explicit", lambda order: order.clamp(min=1)),
        ("explicit", lambda order: order + 1),
        ("explicit", lambda order: order - 1),
        ("bitmap", lambda bitmap: bitmap ^ 1),
        ("segments", lambda planes: planes ^ torch.tensor([[1], [0], [0]], dtype=torch.uint8)),
    ],
)
def test_an_impossible_order_is_refused(ordering, spoil):
    matrix = random_matrix(3, 40, salient=7, block_size=16, ordering=ordering)
    (name,) = set(ORDER_TENSORS) & set(matrix.tensors())
    sound = matrix.tensors()[name]
    with torch.device("meta"):
        check_order(matrix.layout, sound, "layer.order")
    with pytest.raises(CheckpointError, match=r"layer\.order does not"):
        check_order(matrix.layout, spoil(sound), "layer.order")


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


EXPLICIT = random_matrix(9, 45, groups=4, salient=7, block_size=16, scale_bits=8, ordering="explicit")


@pytest.mark.parametrize(
    ("matrix", "name"), [(matrix, name) for matrix in (MATRIX, EXPLICIT) for name in matrix.tensors()]
)
def test_wrong_tensors_are_named(matrix, name):
    tensors = matrix.tensors()
    with pytest.raises(CheckpointError, match=rf"layer\.{name}: missing"):
        BinaryMatrix.from_tensors(matrix.layout, {key: t for key, t in tensors.items() if key != name}, "layer")
    for wrong in (tensors[name].to(torch.int32), tensors[name][:-1]):
        with pytest.raises(CheckpointError, match=rf"layer\.{name}: expected .* found"):
            BinaryMatrix.from_tensors(matrix.layout, {**tensors, name: wrong}, "layer")
    with pytest.raises(CheckpointError, match=r"layer\.weight: this tensor does not belong"):
        BinaryMatrix.from_tensors(matrix.layout, {**tensors, "weight": tensors["signs"]}, "layer")
