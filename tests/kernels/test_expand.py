from itertools import product

import pytest
import torch

from arbllm.binarize.code import COEFFICIENTS, level_values
from arbllm.kernels.expand import PARTS, expanded, part_scales
from tests.kernels.triton_matrices import in_segments


def parts_added_up(terms: int, signs: tuple[int, ...]) -> float:
    """What plain segments make of the signs of a level, each -1 or 1."""
    total = 0.0
    for part in PARTS.values():
        if part.terms != terms:
            continue
        group = sum(2**place for place, sign in enumerate(part.grouping) if signs[0] != signs[sign])
        scales = part_scales(part)[group * len(part.signs) :]
        total += sum(scale * signs[sign] for scale, sign in zip(scales, part.signs, strict=False))
    return total


@pytest.mark.parametrize("terms", COEFFICIENTS)
def test_parts_are_all_levels(terms):
    found = [parts_added_up(terms, signs) for signs in product((-1, 1), repeat=terms + 1)]
    assert found == pytest.approx(level_values(terms), abs=1e-12)


@pytest.mark.parametrize("part", PARTS.values())
def test_scales_are_positive(part):
    assert all(scale > 0 for scale in part_scales(part))


def test_other_segments_stay_as_they_are_in_their_order():
    pieces = expanded(in_segments(9, (5, 2, 1), (3, 1, 4, True), (1, 1, 1), (6, 1, 2, True))).pieces
    assert [(tuple(piece.segment)[:3], piece.part) for piece in pieces] == [
        ((5, 2, 1), 0),
        ((3, 4, 2), 4),
        ((3, 2, 1), 5),
        ((1, 1, 1), 0),
        ((6, 2, 2), 2),
    ]


def test_tensors_are_of_the_sizes_of_the_segments():
    matrix = in_segments(9, (5, 2, 1), (3, 1, 4, True), (1, 1, 1), (6, 1, 2, True))
    plain = expanded(matrix)
    assert plain.row_scales is matrix.row_scales
    assert [(piece.row, piece.row_step) for piece in plain.pieces] == [(0, 1), (2, 0), (2, 0), (3, 1), (4, 0)]
    slots = sum(piece.segment.slots for piece in plain.pieces)
    assert plain.scale_steps.shape == (slots,)
    assert plain.column_scales.shape == (sum(piece.segment.slots * piece.segment.width for piece in plain.pieces),)
    assert plain.order.shape == (5 + 3 + 3 + 1 + 6,)


def test_without_a_trellis_tensors_are_shared():
    matrix = in_segments(9, (64, 2, 1))
    plain = expanded(matrix)
    assert plain.row_scales is matrix.row_scales
    assert plain.column_scales is matrix.column_scales
    assert [(piece.place, piece.source) for piece in plain.pieces] == [(matrix.layout.places[0],) * 2]


def test_float16_scales_become_float32():
    plain = expanded(in_segments(9, (7, 1, 3, True), (2, 2, 1), scale_bits=16))
    assert plain.scale_steps is None
    assert plain.row_scales.dtype == torch.float32
