import pytest
import torch

from arbllm.binarize.code import level_values
from arbllm.format.bitplanes import unpack
from arbllm.kernels.triton_layout import level_bytes, prepare, unit_of
from arbllm.kernels.triton_plan import ROWS_BEFORE, SINGLES_TOGETHER, UNIT, WORD, plan_of
from tests.kernels.triton_matrices import MATRICES, in_segments


def bit_of(column):
    """Of a word, as the module says it."""
    quad = column // 4
    return 16 * (quad % 2) + 4 * (column % 4) + quad // 2


def test_columns_have_bits_of_their_own():
    assert sorted(map(bit_of, range(WORD))) == list(range(32))


def own(ready, band):
    """Columns of a band from its first word's first, without those that fill up."""
    return [k for k in range(band.low, band.high) if ready.factors[band.factor + k] != 0]


@pytest.mark.parametrize("name", MATRICES)
def test_every_column_is_in_one_band_or_alone(name):
    matrix = MATRICES[name]()
    ready, plan = prepare(matrix), plan_of(matrix.layout)
    coded = [int(ready.order[band.column + k]) for band in plan.bands for k in own(ready, band)]
    singles = ready.order[plan.single_start :][: len(plan.singles)].tolist()
    assert sorted(coded + singles) == list(range(matrix.layout.columns))
    assert len(ready.order) == plan.single_start + -(-len(singles) // SINGLES_TOGETHER) * SINGLES_TOGETHER


@pytest.mark.parametrize("name", MATRICES)
def test_bits_are_where_words_hold_them(name):
    matrix = MATRICES[name]()
    ready, plan, layout, order = prepare(matrix), plan_of(matrix.layout), matrix.layout, matrix.column_order()
    natural = list(range(layout.columns)) if order is None else order.tolist()
    signs = unpack(matrix.signs, layout.columns)
    groups = None if matrix.group_bitmap is None else unpack(matrix.group_bitmap, layout.grouped_columns)
    for band in plan.bands:
        for k in own(ready, band)[::5]:
            words = ready.words[UNIT * (band.start + k // WORD * plan.size(band.kind)) :]
            planes = words[ROWS_BEFORE:][: band.kind.planes * plan.height].view(band.kind.planes, plan.height)
            bits = (planes[:, : layout.rows] >> bit_of(k % WORD) & 1).bool()
            stored = natural.index(ready.order[band.column + k])
            place = next(p for p in layout.places if p.column <= stored < p.column + p.segment.width)
            assert not words[:ROWS_BEFORE].any()
            assert torch.equal(bits[0], signs[:, stored])
            if groups is not None and band.kind.groups > 1:
                assert torch.equal(bits[band.kind.terms], groups[:, place.low + stored - place.column])


@pytest.mark.parametrize("name", MATRICES)
def test_scales_and_means_are_where_bands_say(name):
    matrix = MATRICES[name]()
    ready, plan, rows = prepare(matrix), plan_of(matrix.layout), matrix.layout.rows
    for band, place in zip(plan.bands, (place for stream in plan.streams for place in stream), strict=True):
        slots, groups = band.kind.slots(False), band.kind.groups
        found = ready.row_scales[band.scale : band.scale + slots, :rows].T
        assert torch.equal(found, matrix.row_scales[:, place.row_scale : place.row_scale + slots])
        if matrix.row_means is not None:
            found = ready.row_means[band.mean : band.mean + groups, :rows].T
            assert torch.equal(found, matrix.row_means[:, place.row_mean : place.row_mean + groups])


@pytest.mark.parametrize("most", [1, 3, 16])
@pytest.mark.parametrize("name", MATRICES)
def test_units_divide_the_work(name, most):
    plan = plan_of(MATRICES[name]().layout)
    columns: list[int] = []
    singles: list[int] = []
    for unit in plan._divided(most):
        band = next(band for band in plan.bands if band.scale == unit.scale)
        word = (unit.column - band.column) // WORD
        assert plan.kinds[unit.kind] == band.kind
        assert unit.start - band.start == word * plan.size(band.kind)
        assert (unit.stride, unit.mean) == (band.stride, band.mean)
        assert unit.factor - band.factor == unit.column - band.column
        assert 0 < unit.length <= most
        assert 0 <= unit.low < unit.high <= unit.length * WORD
        columns += range(unit.column + unit.low, unit.column + unit.high)
    for unit in plan._alone():
        assert unit.column == plan.single_start + unit.start
        singles += range(unit.start, unit.start + unit.length)
    assert columns == list(range(plan.single_start))
    assert singles == list(range(len(plan.singles)))


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("name", MATRICES)
def test_spans_divide_the_chunks(name, most):
    plan, cpu = plan_of(MATRICES[name]().layout), torch.device("cpu")
    if not plan.bands:
        return
    table = plan.chunk_table(cpu).tolist()
    chunks: list[int] = []
    for kind, start, count, *_ in plan.spans(most, cpu).tolist():
        if kind < len(plan.kinds):
            assert count <= most
            assert {table[chunk][0] for chunk in range(start, start + count)} == {kind}
            chunks += range(start, start + count)
    assert chunks == list(range(plan.chunks)) == list(range(len(table)))


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_levels_are_near_whole_numbers_and_a_half(terms):
    """How far off they are is what `LARGEST_LEVEL` says."""
    levels = torch.tensor(level_values(terms))
    values = (torch.tensor(level_bytes(terms)) + 0.5) * unit_of(terms)
    assert torch.equal(values, -values.flip(0))
    assert set(level_bytes(terms)) <= set(range(-128, 128))
    off = (values - levels).square().mean().sqrt() / levels.square().mean().sqrt()
    assert off <= {1: 1e-5, 2: 1.15e-3, 3: 2.88e-3, 4: 3.71e-3}[terms]


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_memory_with_a_trellis_is_that_of_the_stored_bits(terms):
    rows, columns = 2048, 2048
    ready = prepare(in_segments(rows, *[(columns // 4, 1, terms, True)] * 4))
    assert ready.words.nbytes == columns * (rows * terms + ROWS_BEFORE) // 8
    assert ready.nbytes <= 1.06 * ready.words.nbytes
    assert ready.nbytes == sum(tensor.nbytes for tensor in ready.tensors)


def test_memory_of_a_large_matrix_is_within_a_few_percent():
    matrix = in_segments(2048, *[(512, 2, 1)] * 6, *[(504, 2, 2)] * 2, *[(1, 1, 1)] * 16)
    assert prepare(matrix).nbytes <= 1.05 * matrix.nbytes


def test_small_segments_lie_together():
    matrix = MATRICES["many small segments"]()
    plan = plan_of(matrix.layout)
    assert plan.single_start == 32 + 256  # 30 columns of two signs, 240 of two groups
    assert [band.low for band in plan.bands[5:9]] == [0, 11, 48 % WORD, 59 % WORD]
