import itertools

import pytest
import torch
from torch import Tensor

from arbllm.binarize import sweep as module
from arbllm.binarize.sweep import TILE, Pass, sweep
from arbllm.native import extension

KINDS = tuple(itertools.product((1, 2, 4), (1, 2)))
built = pytest.mark.skipif(extension(torch.device("cpu")) is None, reason="the native extension was not built")


def task(columns: int, rows: int, slots: int, with_values: bool) -> tuple[Tensor, Tensor, Pass]:
    generator = torch.Generator().manual_seed(columns * rows + slots)
    scales = torch.randn(slots, rows, generator=generator), torch.randn(slots, columns, generator=generator)
    state = torch.randn(columns, rows, generator=generator)
    values = torch.randn(columns, rows, generator=generator) if with_values else None
    steps = 0.5 + torch.rand(columns, generator=generator)
    influence = torch.randn(columns, columns, generator=generator) / columns
    return *scales, Pass(state, values, steps, influence)


@built
@pytest.mark.parametrize(("groups", "terms"), KINDS)
@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("columns", [1, 7, TILE, 2 * TILE + 5])
@pytest.mark.parametrize("rows", [1, 31, 64, 100])
def test_native_and_pytorch_choose_the_same(groups, terms, with_values, columns, rows, monkeypatch):
    problem = task(columns, rows, groups * terms, with_values)
    native = sweep(problem[0], problem[1], terms, problem[2])
    monkeypatch.setattr(module, "extension", lambda _: None)
    expected = sweep(problem[0], problem[1], terms, problem[2])
    # Sums are rounded in another order, so that a weight between two levels may go the other way.
    assert (native[0] == expected[0]).float().mean() > 0.99
    same = native[0] == expected[0]
    torch.testing.assert_close(native[1][same], expected[1][same], rtol=1e-5, atol=1e-6)


@built
def test_tensors_that_are_not_contiguous():
    rows, columns, problem = task(9, 20, 2, True)
    expected = sweep(rows, columns, 1, problem)
    turned = Pass(*(part.T.contiguous().T if part is not None and part.ndim == 2 else part for part in problem))
    found = sweep(rows.T.contiguous().T, columns.T.contiguous().T, 1, turned)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@built
def test_shapes_that_do_not_agree_are_refused():
    rows, columns, problem = task(9, 20, 2, True)
    with pytest.raises(ValueError, match="shapes do not agree"):
        sweep(rows[:, 1:], columns, 1, problem)
    with pytest.raises(ValueError, match="shapes do not agree"):
        sweep(rows, columns, 3, problem)
