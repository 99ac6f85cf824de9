import pytest
import torch
from torch.library import opcheck

from arbllm.format.rows import dequantize_rows, quantize_rows
from arbllm.kernels import rows


def weight(height, width):
    return quantize_rows(torch.randn(height, width, generator=torch.Generator().manual_seed(height)))


def inputs(tokens, width):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).bfloat16()


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("height", "width"), [(1, 64), (7, 64), (130, 192), (49, 576)])
def test_products_are_those_of_the_dense_weight(height, width, tokens):
    codes, scales = weight(height, width)
    x = inputs(tokens, width)
    assert rows.suits(x, codes)
    found = rows.multiply(x, codes, scales)
    expected = x.float() @ dequantize_rows(codes, scales, torch.float32).T
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-3)


def test_inputs_and_codes_that_are_not_contiguous():
    codes, scales = weight(12, 64)
    x = inputs(64, 3).T
    found = rows.multiply(x, codes.T.contiguous().T, scales)
    assert torch.equal(found, rows.multiply(x.contiguous(), codes, scales))


@pytest.mark.parametrize(
    ("x", "width"),
    [
        (torch.zeros(1, 64), 64),
        (torch.zeros(17, 64, dtype=torch.bfloat16), 64),
        (torch.zeros(1, 65, dtype=torch.bfloat16), 65),
        (torch.zeros(1, 64, dtype=torch.bfloat16, requires_grad=True), 64),
    ],
    ids=["float32", "many tokens", "odd width", "gradient"],
)
def test_what_it_does_not_suit(x, width):
    assert not rows.suits(x, torch.zeros(3, width, dtype=torch.int8))


def test_the_operator():
    opcheck(torch.ops.arbllm.rows_matmul.default, (inputs(2, 64), *weight(10, 64)))
