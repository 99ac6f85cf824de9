import pytest
import torch
from torch.library import opcheck

from arbllm.errors import ConfigError
from arbllm.format.rows import dequantize_rows, quantize_rows
from arbllm.kernels import cpu, rows

pytestmark = pytest.mark.skipif(not cpu.available(), reason="arbllm was installed without its C++ kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(height, width):
    return quantize_rows(torch.randn(height, width, generator=torch.Generator().manual_seed(height)))


def inputs(tokens, width, dtype=torch.float32):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def dense_product(x, codes, scales):
    return (x.double() @ dequantize_rows(codes, scales, torch.float64).T).to(x.dtype)


@pytest.mark.parametrize("instruction_set", cpu.instruction_sets())
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 64), (7, 65), (130, 192), (1027, 83), (49, 576)])
def test_products_are_those_of_the_dense_weight(height, width, tokens, instruction_set):
    codes, scales = weight(height, width)
    x = inputs(tokens, width)
    assert rows.suits(x)
    found = rows.multiply(x, codes, scales, instruction_set)
    torch.testing.assert_close(found, dense_product(x, codes, scales), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_rounded_once(dtype):
    codes, scales = weight(300, 576)
    x = inputs(3, 576, dtype)
    found = rows.multiply(x, codes, scales)
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(found, dense_product(x, codes, scales), rtol=unit, atol=1e-4)


def test_rows_of_zeros_and_the_largest_codes():
    codes = torch.tensor([[0] * 40, [127] * 40, [-127] * 40], dtype=torch.int8)
    found = rows.multiply(torch.ones(1, 40), codes, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float16))
    assert found.tolist() == [[0.0, 5080.0, -10160.0]]


def test_inputs_and_codes_that_are_not_contiguous():
    codes, scales = weight(12, 64)
    x = inputs(64, 3).T
    found = rows.multiply(x, codes.T.contiguous().T, scales)
    assert torch.equal(found, rows.multiply(x.contiguous(), codes, scales))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(17, 64),
        torch.zeros(1, 64, dtype=torch.float64),
        torch.zeros(1, 64, requires_grad=True),
        torch.zeros(1, 64, device="meta"),
    ],
    ids=["many tokens", "float64", "gradient", "no CPU"],
)
def test_what_it_does_not_suit(x):
    assert not rows.suits(x)


def test_what_needs_no_gradient_suits():
    x = torch.ones(1, 64, requires_grad=True)
    codes, scales = weight(10, 64)
    with torch.no_grad():
        assert rows.suits(x)
        assert torch.equal(rows.multiply(x, codes, scales), rows.multiply(x.detach(), codes, scales))


def test_inputs_of_another_width():
    codes, scales = weight(10, 64)
    with pytest.raises(ValueError, match="inputs have 65 columns, the rows of codes have 64"):
        rows.multiply(torch.zeros(1, 65), codes, scales)


def test_an_instruction_set_that_is_not_there():
    codes, scales = weight(10, 64)
    with pytest.raises(ConfigError, match="'mmx' is not available"):
        rows.multiply(torch.zeros(1, 64), codes, scales, "mmx")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator(dtype):
    opcheck(torch.ops.arbllm.rows_matmul.default, (inputs(2, 64, dtype), *weight(10, 64), 0))
