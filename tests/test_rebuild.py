import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arbllm import rebuild as module
from arbllm.binarize.code import first_level, levels
from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.native import extension
from arbllm.rebuild import Codes
from tests.helpers import random_packed
from tests.strategies import SEEDS, segments

KINDS = (
    *((groups, terms, False) for groups, terms in itertools.product((1, 2, 4), (1, 2))),
    *((1, terms, True) for terms in (1, 2, 3, 4)),
)
built = pytest.mark.skipif(extension(torch.device("cpu")) is None, reason="the native extension was not built")


def packed(rows: int, parts: list[Segment], seed: int = 0) -> BinaryMatrix:
    """A random matrix of these segments, its columns in an order of their own."""
    columns = sum(segment.width for segment in parts)
    return random_packed(Layout(rows, columns, tuple(parts), "explicit", 0, 16, False, True), seed)


def problem(matrix: BinaryMatrix, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Row scales, column scales and a gradient of W."""
    rows, columns = matrix.scales()
    gradient = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5))
    return rows.to(dtype), columns.to(dtype), gradient.to(dtype)


def dense(codes: Codes, rows: Tensor, columns: Tensor) -> Tensor:
    """W (n, m) weight by weight, as docs/format.md has it, for autograd."""
    entries = {}
    for place in codes.layout.places:
        width, groups, terms, trellis = place.segment
        for j in range(width):
            code = codes.values[:, place.column + j].long()
            if trellis:
                level = code - first_level(terms)
                assert 0 <= int(level.min()) <= int(level.max()) < 2 ** (terms + 1)
                size = rows[:, place.row_scale] * columns[place.column_scale + j]
                entries[int(codes.order[place.column + j])] = levels(terms).to(rows.dtype)[level] * size
                continue
            assert int(code.max()) < 16
            value = rows.new_zeros(len(rows))
            for term in range(terms):
                sign = 1.0 - 2.0 * (code >> (2 + term) & 1)
                slot = (code & 3) * terms + term
                assert int(slot.max()) < groups * terms
                row = rows.gather(1, (place.row_scale + slot)[:, None])[:, 0]
                value = value + sign * row * columns[place.column_scale + slot * width + j]
            entries[int(codes.order[place.column + j])] = value
    return torch.stack([entries[j] for j in range(codes.layout.columns)], 1)


def agrees(matrix: BinaryMatrix, dtype: torch.dtype) -> None:
    """Hold weight and gradients against autograd in float64."""
    codes = Codes.from_matrix(matrix)
    rows, columns, gradient = problem(matrix, torch.float64)
    wanted = dense(codes, rows.requires_grad_(), columns.requires_grad_())
    torch.testing.assert_close(wanted.float(), matrix.dequantize(), rtol=1e-5, atol=1e-6)
    expected = wanted, *torch.autograd.grad(wanted, (rows, columns), gradient)
    single = [tensor.detach().to(dtype) for tensor in (rows, columns, gradient)]
    found = codes.rebuild(*single[:2]), *codes.contract(single[2], *single[:2])
    for tensor, reference in zip(found, expected, strict=True):
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), reference.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("native", [pytest.param(True, marks=built), False], ids=["native", "pytorch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 33, 70])
@pytest.mark.parametrize("width", [1, 8, 37])
def test_weight_and_gradients_are_those_of_the_formula(native, kind, rows, width, monkeypatch):
    if not native:
        monkeypatch.setattr(module, "extension", lambda _: None)
    agrees(packed(rows, [Segment(3, 1, 1), Segment(width, *kind), Segment(width, *kind)]), torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    parts=segments(trellis=True),
    rows=st.integers(1, 70),
    seed=SEEDS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_segments(parts, rows, seed, dtype):
    agrees(packed(rows, parts, seed), dtype)


@built
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_native_and_pytorch_compute_the_same_with_any_number_of_threads(threads, monkeypatch):
    trellis = [Segment(45, 1, 1, True), Segment(64, 1, 4, True), Segment(1, 1, 3, True)]
    matrix = packed(67, [Segment(131, 2, 1), *trellis, Segment(70, 4, 2), Segment(1, 1, 1), Segment(1, 1, 1)])
    codes = Codes.from_matrix(matrix)
    rows, columns, gradient = problem(matrix)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    native = codes.rebuild(rows, columns), *codes.contract(gradient, rows, columns)
    again = codes.rebuild(rows, columns), *codes.contract(gradient, rows, columns)
    assert all(map(torch.equal, native, again))
    monkeypatch.setattr(module, "extension", lambda _: None)
    expected = codes.rebuild(rows, columns), *codes.contract(gradient, rows, columns)
    torch.testing.assert_close(native, expected, rtol=1e-5, atol=1e-5)


@built
def test_tensors_that_are_not_contiguous():
    matrix = packed(20, [Segment(9, 2, 1), Segment(19, 1, 3, True), Segment(11, 2, 2)])
    codes = Codes.from_matrix(matrix)
    rows, columns, gradient = problem(matrix)
    turned, turned_gradient = (tensor.T.contiguous().T for tensor in (rows, gradient))
    assert torch.equal(codes.rebuild(turned, columns), codes.rebuild(rows, columns))
    found, expected = codes.contract(turned_gradient, turned, columns), codes.contract(gradient, rows, columns)
    assert all(map(torch.equal, found, expected))


@built
def test_shapes_that_do_not_agree_are_refused():
    matrix = packed(20, [Segment(9, 2, 1), Segment(5, 1, 2, True)])
    codes = Codes.from_matrix(matrix)
    rows, columns, gradient = problem(matrix)
    with pytest.raises(ValueError, match="shapes do not agree"):
        codes.rebuild(rows[:, 1:], columns)
    with pytest.raises(ValueError, match="shapes do not agree"):
        codes.contract(gradient[:, 1:], rows, columns)
    with pytest.raises(ValueError, match="shapes do not agree"):
        codes.contract(gradient, rows, columns[1:])
