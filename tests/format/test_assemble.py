from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.binarize.binarize import binarize_block
from arbllm.binarize.block import Part, Term, Zone
from arbllm.binarize.methods import METHODS, get_method
from arbllm.binarize.scales import shares
from arbllm.binarize.trellis import TrellisPart
from arbllm.config import PARTITIONS
from arbllm.errors import ModelError
from arbllm.format.assemble import assemble
from arbllm.format.matrix import ORDER_TENSORS, check_order
from tests.helpers import trellis_values
from tests.strategies import SEEDS, segments


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


@st.composite
def random_parts(draw):
    """Parts of one matrix with scales as they are stored, and whether they suit 8 bits."""
    rows, codes, trellis = draw(st.integers(1, 45)), draw(st.booleans()), draw(st.booleans())
    drawn = draw(segments(trellis=trellis))
    has_means = False if trellis else draw(st.booleans())
    has_factors = True if trellis else draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def scales(size):
        if not codes:
            return torch.randn(size, generator=generator).half().float()
        exact = torch.randint(1, 256, (size,), generator=generator, dtype=torch.uint8)
        exact[0] = 255  # each slot against its own largest scale
        return 2.0 * shares(exact)

    def term(width):
        signs = torch.randint(2, (rows, width), generator=generator) * 2.0 - 1
        return Term(signs, scales(rows), scales(width) if has_factors else None)

    columns = sum(segment.width for segment in drawn)
    order = torch.randperm(columns, generator=generator) if draw(st.booleans()) else torch.arange(columns)
    ascending, parts = draw(st.booleans()), []
    for segment, place in zip(drawn, order.split([segment.width for segment in drawn]), strict=True):
        place = place.sort().values if ascending else place
        if segment.trellis:
            stored = torch.randint(2, (segment.terms, rows, segment.width), generator=generator).bool()
            parts.append(TrellisPart(place, tuple(stored), scales(rows), scales(segment.width)))
            continue
        number = torch.randint(segment.groups, (rows, segment.width), generator=generator)
        zones = tuple(
            Zone(
                number == group,
                tuple(term(segment.width) for _ in range(segment.terms)),
                torch.randn(rows, generator=generator).half().float() if has_means else None,
            )
            for group in range(segment.groups)
        )
        parts.append(Part(place, zones))
    return parts, codes


@given(drawn=random_parts())
def test_any_parts_dequantize_to_what_they_reconstruct(drawn):
    parts, codes = drawn
    matrix = assemble(parts, scale_bits=8 if codes else 16)
    order = torch.cat([part.columns for part in parts])
    expected = torch.empty(matrix.shape)
    expected[:, order] = torch.cat(
        [trellis_values(part) if isinstance(part, TrellisPart) else part.reconstruct() for part in parts], 1
    )
    torch.testing.assert_close(matrix.dequantize(), expected, rtol=1e-5, atol=1e-5)
    matrix.layout.check()
    stored = matrix.column_order()
    assert (list(range(len(order))) if stored is None else stored.tolist()) == order.tolist()
    for name in ORDER_TENSORS:
        if name in matrix.tensors():
            check_order(matrix.layout, matrix.tensors()[name], name)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.fit])
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


def part_of(columns, terms=1):
    """A part of one zone and one row."""
    term = Term(torch.ones(1, len(columns)), torch.ones(1))
    return Part(torch.tensor(columns), (Zone(torch.ones(1, len(columns)).bool(), (term,) * terms),))


@pytest.mark.parametrize(
    ("parts", "block_size", "ordering"),
    [
        ([part_of([0, 1]), part_of([2, 3], 2)], 2, "natural"),
        ([part_of([0, 2]), part_of([1, 3], 2)], 4, "bitmap"),
        ([part_of([0]), part_of([1], 2), part_of([3]), part_of([2], 2)], 2, "bitmap"),
        ([part_of([0, 2]), part_of([1, 3], 2)], 2, "segments"),
        ([part_of([1, 3], 2), part_of([0, 2])], None, "segments"),
        ([part_of([1, 3], 2), part_of([2, 0])], None, "explicit"),
    ],
)
def test_an_order_is_stored_in_the_cheapest_way(parts, block_size, ordering):
    layout = assemble(parts, block_size=block_size).layout
    assert (layout.ordering, layout.block_size) == (ordering, block_size if ordering == "bitmap" else 0)


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
