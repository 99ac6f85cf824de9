from dataclasses import fields

import pytest
import torch

from arbllm.binarize.code import level_values
from arbllm.format.bitplanes import unpack
from arbllm.kernels.triton_trellis_layout import (
    CHUNK,
    ROWS_BEFORE,
    SINGLES_TOGETHER,
    UNIT,
    WORD,
    level_bytes,
    plan_of,
    prepare,
    unit_of,
)
from tests.kernels.triton_matrices import MATRICES, in_segments

TRELLIS = [name for name in MATRICES if MATRICES[name]().layout.has_trellis]
CPU = torch.device("cpu")


def bit_of(column):
    """Of a word, as the module says it."""
    quad = column // 4
    return 16 * (quad % 2) + 4 * (column % 4) + quad // 2


def test_columns_have_bits_of_their_own():
    assert sorted(map(bit_of, range(WORD))) == list(range(32))


@pytest.mark.parametrize("name", TRELLIS)
def test_every_column_is_in_one_band_or_alone(name):
    matrix = MATRICES[name]()
    ready, plan = prepare(matrix), plan_of(matrix.layout)
    coded = ready.order[: plan.single_start][ready.factors[: plan.single_start] != 0]
    singles = ready.order[plan.single_start :][: len(plan.singles)]
    found = torch.cat([coded, singles, ready.other_columns])
    assert sorted(found.tolist()) == list(range(matrix.layout.columns))
    assert len(ready.order) == plan.single_start + -(-len(singles) // SINGLES_TOGETHER) * SINGLES_TOGETHER


@pytest.mark.parametrize("name", TRELLIS)
def test_signs_are_where_words_hold_them(name):
    matrix = MATRICES[name]()
    ready, plan, order = prepare(matrix), plan_of(matrix.layout), matrix.column_order()
    signs = unpack(matrix.signs, matrix.layout.columns)
    natural = list(range(matrix.layout.columns)) if order is None else order.tolist()
    for band in plan.bands:
        size = band.terms * plan.height + ROWS_BEFORE
        for column in range(0, band.words * WORD, 5):
            if ready.factors[band.column + column] == 0:
                continue
            words = ready.words[UNIT * band.start + column // WORD * size :][:size]
            assert not words[:ROWS_BEFORE].any()
            bits = words[ROWS_BEFORE:][: matrix.layout.rows] >> bit_of(column % WORD) & 1
            stored = natural.index(ready.order[band.column + column])
            assert torch.equal(bits.bool(), signs[:, stored])


@pytest.mark.parametrize("most", [1, 3, 16])
@pytest.mark.parametrize("name", TRELLIS)
def test_units_divide_the_work(name, most):
    plan = plan_of(MATRICES[name]().layout)
    columns: list[int] = []
    singles: list[int] = []
    for kind, start, count, column, segment in plan.units(most, CPU).tolist():
        if kind == len(plan.kinds):
            assert column == plan.single_start + start
            singles += range(start, start + count)
        else:
            band = plan.bands[segment]
            assert plan.kinds[kind] == band.terms
            size = band.terms * plan.height + ROWS_BEFORE
            assert UNIT * (start - band.start) == (column - band.column) // WORD * size
            assert count <= most
            columns += range(column, column + count * WORD)
    assert columns == list(range(plan.single_start))
    assert singles == list(range(len(plan.singles)))


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("name", TRELLIS)
def test_spans_divide_the_chunks(name, most):
    plan = plan_of(MATRICES[name]().layout)
    table = plan.chunk_table(CPU).tolist()
    chunks: list[int] = []
    for kind, start, count, *_ in plan.spans(most, CPU).tolist():
        if kind < len(plan.kinds):
            assert count <= most
            assert {table[chunk][0] for chunk in range(start, start + count)} == {kind}
            chunks += range(start, start + count)
    assert chunks == list(range(plan.chunks)) == list(range(len(table)))


def test_chunks_are_as_few_as_may_be_and_each_of_one_band():
    plan = plan_of(in_segments(9, (1500, 1, 2, True), (40, 1, 3, True)).layout)
    words = [length for _, _, length, _, segment in plan.chunk_table(CPU).tolist() if segment == 0]
    assert words == [CHUNK] * (47 // CHUNK) + [47 % CHUNK]
    assert plan.chunks == len(words) + 1


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
def test_memory_is_that_of_the_stored_bits(terms):
    rows, columns = 2048, 2048
    ready = prepare(in_segments(rows, *[(columns // 4, 1, terms, True)] * 4))
    assert ready.words.nbytes == columns * (rows * terms + ROWS_BEFORE) // 8
    assert ready.nbytes <= 1.06 * ready.words.nbytes
    assert ready.nbytes == sum(tensor.nbytes for tensor in ready.tensors)
    assert len(ready.tensors) == len(fields(ready)) - 1  # all but the plan
