import pytest
import torch

from arbllm.format.bitplanes import unpack
from arbllm.kernels.expand import expanded
from arbllm.kernels.triton_layout import prepare
from arbllm.kernels.triton_plan import CHUNK, LONGEST_RUN, ROWS_BEFORE, ROWS_OF_A_WORD, WORDS
from tests.kernels.triton_matrices import MATRICES, in_segments


@pytest.mark.parametrize("name", MATRICES)
def test_every_column_is_in_one_run_or_alone(name):
    """Of plain segments: a column of a trellis with four signs is in two of them."""
    matrix = MATRICES[name]()
    ready, order = prepare(matrix), expanded(matrix).order
    columns = [ready.order[run.column + run.low : run.column + run.high] for run in ready.plan.runs]
    found = torch.cat([*columns, ready.single_columns[0]])
    assert sorted(found.tolist()) == (list(range(matrix.layout.columns)) if order is None else sorted(order.tolist()))
    assert all(run.chunks <= LONGEST_RUN and run.high <= run.stop <= run.chunks * CHUNK for run in ready.plan.runs)


@pytest.mark.parametrize("name", MATRICES)
def test_signs_are_where_words_hold_them(name):
    matrix = MATRICES[name]()
    ready, layout, plain = prepare(matrix), matrix.layout, expanded(matrix)
    order = matrix.column_order()
    signs = unpack(matrix.signs, layout.columns)
    for run in ready.plan.runs:
        before = ROWS_BEFORE * WORDS if run.kind.part else 0
        size = before + run.kind.planes * ready.plan.quarter * WORDS
        piece = next(piece for piece in plain.pieces if piece.place.row_scale == run.step)
        for k in range(run.low, run.high, 7):
            column = piece.source.column + run.factor + k - piece.place.column_scale
            chunk, inside = divmod(k, CHUNK)
            start = run.words * WORDS + chunk * size + before
            words = ready.words[start:][: ready.plan.quarter * WORDS].view(-1, WORDS)
            bits = [words[:, inside % WORDS] >> (4 * quarter + inside // WORDS) & 1 for quarter in range(4)]
            assert torch.equal(torch.cat(bits)[: layout.rows].bool(), signs[:, column])
            assert ready.order[run.column + k] == (column if order is None else order[column])
            if before:
                above = ready.words[start - before :][:before].view(-1, WORDS)
                assert torch.equal(above, words[-ROWS_BEFORE:] << 4)


@pytest.mark.parametrize("chunks", [1, 3, 100])
@pytest.mark.parametrize("name", MATRICES)
def test_units_divide_the_work(name, chunks):
    ready = prepare(MATRICES[name]())
    units = ready.plan.units(chunks, torch.device("cpu")).tolist()
    runs = [number for kind, first, last in units if kind < len(ready.plan.kinds) for number in range(first, last)]
    assert runs == list(range(len(ready.plan.runs)))
    singles = [number for kind, first, last in units if kind == len(ready.plan.kinds) for number in range(first, last)]
    assert singles == list(range(len(ready.singles)))
    for kind, first, last in units:
        if kind < len(ready.plan.kinds):
            members = ready.plan.runs[first:last]
            assert {run.kind for run in members} == {ready.plan.kinds[kind]}
            assert len(members) == 1 or sum(run.chunks for run in members) <= chunks


@pytest.mark.parametrize("name", MATRICES)
def test_memory_is_that_of_the_packed_tensors(name):
    """Up to what rounds each kind of columns up to a chunk and rows to four, rows above, tables, scales of segments."""
    matrix = MATRICES[name]()
    ready = prepare(matrix)
    rows = 4 * ready.plan.quarter
    padding = sum(CHUNK * kind.planes for kind in ready.plan.kinds) * rows // 8
    trellis = sum(CHUNK * family.chunks for family in ready.plan.families if family.kind.part)
    padding += trellis * ROWS_OF_A_WORD * ROWS_BEFORE // 8
    tables = ready.order.nbytes + ready.single_columns.nbytes + ready.run_table.nbytes + ready.singles.nbytes
    scales = ready.row_scales.nbytes + ready.column_scales.nbytes + ready.steps.nbytes
    assert ready.nbytes <= matrix.nbytes * rows / matrix.layout.rows + padding + tables + scales


def test_memory_of_a_large_matrix_is_within_three_percent():
    matrix = in_segments(2048, *[(512, 2, 1)] * 6, *[(504, 2, 2)] * 2, *[(1, 1, 1)] * 16)
    assert prepare(matrix).nbytes <= 1.03 * matrix.nbytes


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_words_of_a_trellis_are_its_stored_bits(terms):
    rows, columns = 2048, 2048
    ready = prepare(in_segments(rows, *[(columns // 4, 1, terms, True)] * 4))
    assert ready.words.nbytes == columns * (rows * terms + ROWS_OF_A_WORD * ROWS_BEFORE) // 8
    assert ready.nbytes <= 1.06 * ready.words.nbytes
