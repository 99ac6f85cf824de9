import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.format import matrix as matrix_module
from arbllm.format.decode import Decoder
from arbllm.kernels.reference import matmul
from tests.helpers import random_matrix
from tests.strategies import matrices

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@given(matrix=matrices(), tokens=st.integers(0, 5), dtype=st.sampled_from(list(TOLERANCE)))
def test_equals_the_product_with_the_dense_weight(matrix, tokens, dtype):
    x = torch.randn(tokens, matrix.layout.columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    y = matmul(x, matrix)
    expected = x.double() @ matrix.dequantize().double().T
    assert y.dtype == dtype
    scale = (x.double().abs() @ matrix.dequantize().double().abs().T).clamp(min=1e-6)
    assert ((y.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()


def test_the_input_is_put_in_stored_order():
    matrix = random_matrix(20, 30, salient=4, ordering="explicit")
    x = torch.randn(3, 30)
    stored = torch.cat([weight for _, weight in matrix.stored_tiles()])
    torch.testing.assert_close(matmul(x, matrix), x[:, matrix.column_order()] @ stored.T)


def test_float64_input_is_not_rounded_to_float32():
    matrix, x = random_matrix(20, 30, salient=4), torch.randn(3, 30, dtype=torch.float64)
    torch.testing.assert_close(matmul(x, matrix), x @ matrix.dequantize(torch.float64).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
def test_any_leading_dimensions(shape):
    matrix, x = random_matrix(20, 30, salient=4), torch.randn(*shape, 30)
    y = matmul(x, matrix)
    assert y.shape == (*shape, 20)
    torch.testing.assert_close(y, x @ matrix.dequantize().T)


def test_any_strides():
    matrix = random_matrix(20, 30, salient=4)
    x = torch.randn(30, 4, 6).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(matmul(x, matrix), matmul(x.contiguous(), matrix))
    expanded = torch.randn(1, 30).expand(5, 30)
    torch.testing.assert_close(matmul(expanded, matrix), matmul(expanded.contiguous(), matrix))


def test_gradient_reaches_the_input():
    matrix, x = random_matrix(20, 30, salient=4), torch.randn(3, 30, requires_grad=True)
    matmul(x, matrix).sum().backward()
    torch.testing.assert_close(x.grad, matrix.dequantize().sum(0).expand(3, 30))


def test_the_dense_weight_never_exists_whole(monkeypatch):
    monkeypatch.setattr(matrix_module, "TILE_WEIGHTS", 16 * 24)
    rows = 3 * 16 + 5
    matrix = random_matrix(rows, 24, salient=3)
    heights = []
    original = Decoder.rows

    def watched(self, tile):
        dense = original(self, tile)
        heights.append(len(dense))
        return dense

    monkeypatch.setattr(Decoder, "rows", watched)
    y = matmul(torch.randn(2, 24), matrix)
    assert y.shape == (2, rows)
    assert heights == [16, 16, 16, 5]
