import pytest
import torch

from arbllm.format.bitplanes import unpack
from arbllm.kernels.expand import expanded
from arbllm.kernels.triton_layout import CHUNK, LONGEST_RUN, WORDS, prepare
from tests.kernels.triton_matrices import MATRICES, in_segments


@pytest.mark.parametrize("name", MATRICES)
def test_every_column_is_in_one_run_or_alone(name):
    """Of plain segments: a column of a trellis with four signs is in two of them."""
    matrix = MATRICES[name]()
    ready, order = prepare(matrix), expanded(matrix).column_order()
    columns = [ready.order[run.column + run.low : run.column + run.high] for run in ready.runs]
    found = torch.cat([*columns, ready.single_columns[0]])
    assert sorted(found.tolist()) == (list(range(matrix.layout.columns)) if order is None else sorted(order.tolist()))
    assert all(run.chunks <= LONGEST_RUN and run.high <= run.stop <= run.chunks * CHUNK for run in ready.runs)


@pytest.mark.parametrize("name", MATRICES)
def test_signs_are_where_words_hold_them(name):
    matrix = expanded(MATRICES[name]())
    ready, layout = prepare(MATRICES[name]()), matrix.layout
    order = matrix.column_order()
    signs = unpack(matrix.signs, layout.columns)
    for run in ready.runs:
        planes = run.terms + run.groups.bit_length() - 1
        size = planes * ready.quarter * WORDS
        place = next(place for place in layout.places if place.row_scale == run.row_scale)
        for k in range(run.low, run.high, 7):
            column = place.column + run.factor + k - place.column_scale
            chunk, inside = divmod(k, CHUNK)
            words = ready.words[run.words * WORDS + chunk * size :][: ready.quarter * WORDS].view(-1, WORDS)
            bits = [words[:, inside % WORDS] >> (4 * quarter + inside // WORDS) & 1 for quarter in range(4)]
            assert torch.equal(torch.cat(bits)[: layout.rows].bool(), signs[:, column])
            assert ready.order[run.column + k] == (column if order is None else order[column])


@pytest.mark.parametrize("chunks", [1, 3, 100])
@pytest.mark.parametrize("name", MATRICES)
def test_units_divide_the_work(name, chunks):
    ready = prepare(MATRICES[name]())
    units = ready.units(chunks).tolist()
    runs = [number for kind, first, last in units if kind < len(ready.kinds) for number in range(first, last)]
    assert runs == list(range(len(ready.runs)))
    singles = [number for kind, first, last in units if kind == len(ready.kinds) for number in range(first, last)]
    assert singles == list(range(len(ready.singles)))
    for kind, first, last in units:
        if kind < len(ready.kinds):
            members = ready.runs[first:last]
            assert {run.kind for run in members} == {ready.kinds[kind]}
            assert len(members) == 1 or sum(run.chunks for run in members) <= chunks


@pytest.mark.parametrize("name", MATRICES)
def test_memory_is_that_of_the_packed_tensors(name):
    """Up to what rounds each kind of columns up to a chunk and rows to four, and tables of columns and runs."""
    matrix = expanded(MATRICES[name]())
    ready, rows = prepare(matrix), 4 * (-(-matrix.layout.rows // 4))
    padding = sum(CHUNK * (terms + groups.bit_length() - 1) for groups, terms in ready.kinds) * rows // 8
    tables = ready.order.nbytes + ready.single_columns.nbytes + ready.run_table.nbytes + ready.singles.nbytes
    assert ready.nbytes <= matrix.nbytes * rows / matrix.layout.rows + padding + tables


def test_memory_of_a_large_matrix_is_within_three_percent():
    matrix = in_segments(2048, *[(512, 2, 1)] * 6, *[(504, 2, 2)] * 2, *[(1, 1, 1)] * 16)
    assert prepare(matrix).nbytes <= 1.03 * matrix.nbytes


@pytest.mark.parametrize(("terms", "bits"), [(1, 2), (2, 3), (3, 4), (4, 6)])
def test_memory_of_a_large_trellis(terms, bits):
    rows, columns = 2048, 2048
    ready = prepare(in_segments(rows, *[(columns // 4, 1, terms, True)] * 4))
    assert ready.words.nbytes == rows * columns * bits // 8
    assert ready.nbytes <= 1.06 * ready.words.nbytes
