from itertools import product

import pytest
import torch

from arbllm.binarize.code import level_values
from arbllm.kernels import expand
from arbllm.kernels.expand import PARTS, expanded, part_scales
from tests.kernels.triton_matrices import MATRICES, in_segments

TRELLISES = [name for name in MATRICES if name.startswith("trellis")]


def parts_added_up(terms: int, signs: tuple[int, ...]) -> float:
    """What plain segments make of the signs of a level, each -1 or 1."""
    total = 0.0
    for part in PARTS[terms]:
        group = sum(2**place for place, sign in enumerate(part.grouping) if signs[0] != signs[sign])
        scales = part_scales(terms, part)[group * len(part.signs) :]
        total += sum(scale * signs[sign] for scale, sign in zip(scales, part.signs, strict=False))
    return total


@pytest.mark.parametrize("terms", PARTS)
def test_parts_are_all_levels(terms):
    found = [parts_added_up(terms, signs) for signs in product((-1, 1), repeat=terms + 1)]
    assert found == pytest.approx(level_values(terms), abs=1e-12)


@pytest.mark.parametrize("terms", PARTS)
def test_scales_are_positive(terms):
    assert all(scale > 0 for part in PARTS[terms] for scale in part_scales(terms, part))


@pytest.mark.parametrize("name", TRELLISES)
@pytest.mark.parametrize("tile", [expand.TILE_BITS, 2**12], ids=["whole", "in tiles"])
def test_weights_are_the_same(monkeypatch, name, tile):
    monkeypatch.setattr(expand, "TILE_BITS", tile)
    matrix = MATRICES[name]()
    plain = expanded(matrix)
    assert not plain.layout.has_trellis
    stored = torch.cat([weight for _, weight in plain.stored_tiles()])
    found = torch.zeros(matrix.shape).index_add_(1, plain.column_order(), stored)
    torch.testing.assert_close(found, matrix.dequantize(), rtol=1e-5, atol=1e-6)


def test_other_segments_stay_as_they_are_in_their_order():
    segments = expanded(in_segments(9, (5, 2, 1), (3, 1, 4, True), (1, 1, 1), (6, 1, 2, True))).layout.segments
    assert segments == ((5, 2, 1, False), (3, 4, 2, False), (3, 2, 1, False), (1, 1, 1, False), (6, 2, 2, False))


def test_tensors_are_of_the_sizes_of_their_layout():
    matrix = expanded(in_segments(9, (5, 2, 1), (3, 1, 4, True), (1, 1, 1), (6, 1, 2, True)))
    sizes = {name: tuple(tensor.shape) for name, tensor in matrix.tensors().items()}
    assert sizes == {name: shape for name, (_, shape) in matrix.layout.tensors().items()}


def test_without_a_trellis_nothing_changes():
    matrix = in_segments(9, (64, 2, 1))
    assert expanded(matrix) is matrix
