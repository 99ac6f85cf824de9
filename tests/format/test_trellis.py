from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arbllm.binarize.code import COEFFICIENTS, PRODUCTS, all_levels, first_level
from arbllm.binarize.scales import LARGEST_CODE, STEPS_PER_OCTAVE
from arbllm.errors import CheckpointError
from arbllm.format.accounting import matrix_size
from arbllm.format.layout import Layout, Place, Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.trellis import level_numbers
from tests.helpers import in_segments

PLAIN, GROUPS, SALIENT = Segment(9, 1, 1), Segment(7, 4, 1), Segment(12, 2, 2)
TRELLIS = tuple(Segment(width, 1, terms, True) for terms, width in enumerate((5, 11, 1, 10), start=1))
MIXED = (TRELLIS[2], SALIENT, TRELLIS[0], PLAIN, TRELLIS[3], TRELLIS[1], GROUPS, TRELLIS[3])
MATRICES = {
    "one sign": lambda: in_segments(50, TRELLIS[0]),
    "four signs": lambda: in_segments(50, TRELLIS[3], ordering="explicit"),
    "every number of signs": lambda: in_segments(45, *TRELLIS, ordering="segments", scale_bits=8),
    "mixed": lambda: in_segments(42, *MIXED, ordering="segments", scale_bits=8),
    "mixed, in another order": lambda: in_segments(70, *MIXED[::-1], ordering="explicit"),
    "one row": lambda: in_segments(1, *MIXED, scale_bits=8),
}


class Bits:
    """The bits of a packed plane, one at a time."""

    def __init__(self, packed: Tensor | None) -> None:
        self.rows = [] if packed is None else packed.tolist()

    def __call__(self, row: int, column: int) -> int:
        return self.rows[row][column // 8] >> column % 8 & 1 if row >= 0 else 0


def scale_of(values: list[float], slot: int, steps: list[float] | None) -> float:
    """A row scale, or a column scale without its step."""
    value = values[slot]
    if steps is None:
        return value
    share = 0.0 if value == 0 else 2 ** ((value - LARGEST_CODE) / STEPS_PER_OCTAVE)
    return share * steps[slot] if steps else share


def plain_number(matrix: BinaryMatrix, place: Place, row: int, j: int) -> int:
    """The number that the bits of a weight of a trellis make."""
    tensors = matrix.tensors()
    signs, column = Bits(tensors["signs"]), place.column + j
    bits = []
    for name, start in (("second", place.second), ("third", place.third), ("fourth", place.fourth))[
        : place.segment.terms - 1
    ]:
        bits.append(Bits(tensors[f"{name}_signs"])(row, start + j))
    bits.append(signs(row, column) ^ signs(row - 16, column) ^ signs(row - 40, column))
    bits.append(signs(row - 24, column))
    return sum(bit << at for at, bit in enumerate(reversed(bits)))


def plain_level(number: int, terms: int) -> float:
    signs = [2 * (number >> terms - place & 1) - 1 for place in range(terms + 1)]
    level = sum(c * sign for c, sign in zip(COEFFICIENTS[terms], signs, strict=True))
    return level + sum(c * signs[a] * signs[b] * signs[d] for (a, b, d), c in PRODUCTS[terms].items())


def plain_decoder(matrix: BinaryMatrix) -> Tensor:
    """The dense weight, weight by weight."""
    layout, tensors = matrix.layout, matrix.tensors()
    low, high, second, signs = (
        Bits(tensors.get(name)) for name in ("group_bitmap", "group_bitmap_high", "second_signs", "signs")
    )
    coded = layout.scale_bits == 8
    rows, columns = tensors["row_scales"].tolist(), tensors["column_scales"].tolist()
    steps = tensors["scale_steps"].tolist() if coded else None
    order = matrix.column_order()
    dense = torch.full(matrix.shape, torch.nan, dtype=torch.float64)
    for place in layout.places:
        width, groups, terms, trellis = place.segment
        for row in range(layout.rows):
            for j in range(width):
                group = low(row, place.low + j) if groups > 1 else 0
                group += 2 * high(row, place.high + j) if groups > 2 else 0
                value = 0.0
                for term in range(1 if trellis else terms):
                    slot = group * terms + term
                    size = scale_of(rows[row], place.row_scale + slot, steps)
                    size *= scale_of(columns, place.column_scale + slot * width + j, [] if coded else None)
                    if trellis:
                        value = plain_level(plain_number(matrix, place, row, j), terms) * size
                    else:
                        positive = signs(row, place.column + j) if term == 0 else second(row, place.second + j)
                        value += size if positive else -size
                column = place.column + j
                dense[row, column if order is None else int(order[column])] = value
    return dense


@pytest.mark.parametrize("name", MATRICES)
def test_level_numbers_are_those_of_the_bits(name):
    matrix = MATRICES[name]()
    rows = matrix.layout.rows
    found = list(level_numbers(matrix.layout, matrix.tensors(), slice(0, rows)))
    assert [place for place, _ in found] == [place for place in matrix.layout.places if place.segment.trellis]
    for place, numbers in found:
        first = first_level(place.segment.terms)
        expected = [
            [first + plain_number(matrix, place, row, j) for j in range(place.segment.width)] for row in range(rows)
        ]
        assert numbers.dtype == torch.uint8
        assert numbers.tolist() == expected
        assert all_levels()[int(numbers.max())] == pytest.approx(
            plain_level(int(numbers.max()) - first, place.segment.terms)
        )


@pytest.mark.parametrize("name", MATRICES)
def test_every_weight_is_what_its_bits_say(name):
    matrix = MATRICES[name]()
    torch.testing.assert_close(matrix.dequantize().double(), plain_decoder(matrix), rtol=1e-5, atol=1e-7)


@given(bounds=st.tuples(st.integers(0, 70), st.integers(0, 70)), name=st.sampled_from(list(MATRICES)))
def test_any_rows_are_those_of_the_whole(bounds, name):
    """Bits follow from rows above, which need not be among those asked for."""
    matrix = MATRICES[name]()
    start, stop = sorted(min(bound, matrix.layout.rows) for bound in bounds)
    if start < stop:
        assert torch.equal(matrix.dequantize_rows(start, stop), matrix.dequantize()[start:stop])


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_tiles_join(rows):
    matrix = MATRICES["mixed, in another order"]()
    assert torch.equal(torch.cat([tile for _, tile in matrix.tiles(rows=rows)]), matrix.dequantize())


# Layout.


def test_a_layout_with_a_trellis_round_trips():
    layout = MATRICES["mixed"]().layout
    values = layout.to_dict()
    assert values["segments"][:2] == [[1, 1, 3, True], [12, 2, 2, False]]
    assert Layout.from_dict(values) == layout
    assert layout.has_trellis
    assert not replace(layout, segments=(SALIENT,), columns=12).has_trellis


def test_sizes_follow_from_the_signs():
    layout = in_segments(6, *TRELLIS, SALIENT).layout
    assert [segment.bits for segment in layout.segments] == [1, 2, 3, 4, 3]
    assert [segment.slots for segment in layout.segments] == [1, 1, 1, 1, 4]
    assert (layout.salient, layout.columns_of_terms(3), layout.columns_of_terms(4)) == (11 + 1 + 10 + 12, 11, 10)
    assert layout.signs == 5 + 2 * 11 + 3 + 4 * 10 + 2 * 12
    assert (layout.row_scale_slots, layout.column_scale_slots) == (8, 5 + 11 + 1 + 10 + 4 * 12)
    assert layout.tensors() == {
        "signs": (torch.uint8, (6, 5)),
        "group_bitmap": (torch.uint8, (6, 2)),
        "second_signs": (torch.uint8, (6, 5)),
        "third_signs": (torch.uint8, (6, 2)),
        "fourth_signs": (torch.uint8, (6, 2)),
        "row_scales": (torch.float16, (6, 8)),
        "column_scales": (torch.float16, (75,)),
    }
    assert layout.places[3] == Place(TRELLIS[3], 17, 3, 3, 17, 0, 0, 12, 1, 0)
    assert layout.places[4] == Place(SALIENT, 27, 4, 4, 27, 0, 0, 22, 11, 10)


@pytest.mark.parametrize("name", MATRICES)
def test_size_is_that_of_the_tensors(name):
    matrix = MATRICES[name]()
    size = matrix_size(matrix.layout)
    assert size.nbytes == matrix.nbytes == sum(tensor.nbytes for tensor in matrix.tensors().values())
    assert size.true_bits == pytest.approx(matrix.true_bits)
    assert size.nominal_bits == pytest.approx(matrix.nominal_bits)
    assert matrix.nominal_bits == sum(s.width * s.terms for s in matrix.layout.segments) / matrix.layout.columns


def test_further_signs_are_counted_together():
    parts = matrix_size(in_segments(6, *TRELLIS, SALIENT).layout).parts
    assert parts["second_signs"] == 6 * (5 + 2 + 2)


@pytest.mark.parametrize(
    "segment",
    [
        [40, 2, 1, True],
        [40, 4, 4, True],
        [40, 1, 5, True],
        [40, 1, 0, True],
        [40, 1, 3, False],
        [40, 1, 1, 1],
        [40, 1, 1, None],
        [40, 1, 1, "true"],
        [40, 1, True, True],
        [40, True, 1, True],
        [40.0, 1, 1, True],
    ],
)
def test_unsound_segments_are_refused(segment):
    values = in_segments(6, Segment(40, 1, 1, True)).layout.to_dict()
    with pytest.raises(CheckpointError, match=r"model\.q_proj: a segment must have .* or one group and \(1, 2, 3, 4\)"):
        Layout.from_dict({**values, "segments": [segment]}, "model.q_proj")


@pytest.mark.parametrize("change", [{"row_means": True}, {"column_scaled": False}])
def test_a_trellis_needs_column_scales_and_has_no_row_means(change):
    values = in_segments(6, PLAIN, TRELLIS[1]).layout.to_dict()
    with pytest.raises(CheckpointError, match=r"layer: a trellis has column scales and no row means"):
        Layout.from_dict({**values, **change}, "layer")


@pytest.mark.parametrize("name", ["second_signs", "third_signs", "fourth_signs"])
def test_missing_and_misshapen_signs_are_named(name):
    matrix = MATRICES["mixed"]()
    tensors = matrix.tensors()
    with pytest.raises(CheckpointError, match=rf"layer\.{name}: missing"):
        BinaryMatrix.from_tensors(matrix.layout, {key: t for key, t in tensors.items() if key != name}, "layer")
    with pytest.raises(CheckpointError, match=rf"layer\.{name}: expected .* found"):
        BinaryMatrix.from_tensors(matrix.layout, {**tensors, name: tensors[name][:, 1:]}, "layer")
