import pytest
import torch

from arbllm.format.bitplanes import unpack
from arbllm.kernels.triton_layout import prepare
from arbllm.kernels.triton_plan import CHUNK, LONGEST_RUN, WORDS
from tests.kernels.triton_matrices import MATRICES, in_segments

PLAIN = [name for name in MATRICES if not MATRICES[name]().layout.has_trellis]


@pytest.mark.parametrize("name", PLAIN)
def test_every_column_is_in_one_run_or_alone(name):
    matrix = MATRICES[name]()
    ready = prepare(matrix)
    columns = [ready.order[run.column + run.low : run.column + run.high] for run in ready.plan.runs]
    found = torch.cat([*columns, ready.single_columns[0]])
    assert sorted(found.tolist()) == list(range(matrix.layout.columns))
    assert all(run.chunks <= LONGEST_RUN and run.high <= run.stop <= run.chunks * CHUNK for run in ready.plan.runs)


@pytest.mark.parametrize("name", PLAIN)
def test_signs_are_where_words_hold_them(name):
    matrix = MATRICES[name]()
    ready, layout, order = prepare(matrix), matrix.layout, matrix.column_order()
    signs = unpack(matrix.signs, layout.columns)
    for run in ready.plan.runs:
        size = run.kind.planes * ready.plan.quarter * WORDS
        place = next(place for place in layout.places if place.row_scale == run.slot)
        for k in range(run.low, run.high, 7):
            column = place.column + run.factor + k - place.column_scale
            chunk, inside = divmod(k, CHUNK)
            start = run.words * WORDS + chunk * size
            words = ready.words[start:][: ready.plan.quarter * WORDS].view(-1, WORDS)
            bits = [words[:, inside % WORDS] >> (4 * quarter + inside // WORDS) & 1 for quarter in range(4)]
            assert torch.equal(torch.cat(bits)[: layout.rows].bool(), signs[:, column])
            assert ready.order[run.column + k] == (column if order is None else order[column])


@pytest.mark.parametrize("chunks", [1, 3, 100])
@pytest.mark.parametrize("name", PLAIN)
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


@pytest.mark.parametrize("name", PLAIN)
def test_memory_is_that_of_the_packed_tensors(name):
    """Up to what rounds each kind of columns up to a chunk and rows to four, and tables."""
    matrix = MATRICES[name]()
    ready = prepare(matrix)
    rows = 4 * ready.plan.quarter
    padding = sum(CHUNK * kind.planes for kind in ready.plan.kinds) * rows // 8
    tables = ready.order.nbytes + ready.single_columns.nbytes + ready.run_table.nbytes + ready.singles.nbytes
    scales = ready.row_scales.nbytes + ready.column_scales.nbytes + ready.steps.nbytes
    assert ready.nbytes <= matrix.nbytes * rows / matrix.layout.rows + padding + tables + scales


def test_memory_of_a_large_matrix_is_within_three_percent():
    matrix = in_segments(2048, *[(512, 2, 1)] * 6, *[(504, 2, 2)] * 2, *[(1, 1, 1)] * 16)
    assert prepare(matrix).nbytes <= 1.03 * matrix.nbytes
