"""What PyTorch makes where nobody says of which dtype, or on which device, is a program's own choice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import arbllm
from arbllm.embedding import Int8Linear
from arbllm.nn import BinaryLinear
from tests.helpers import random_matrix
from tests.kernels.triton_matrices import in_segments

MATRICES = {
    "groups": random_matrix(40, 70, salient=9),
    "trellis": in_segments(51, (40, 2, 1), (33, 1, 3, True), (73, 1, 4, True)),
    "trellis, float16": in_segments(51, (33, 1, 3, True), (40, 2, 1), scale_bits=16),
}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def by_default(request):
    """A function's result where new tensors have another dtype."""

    def call(function: Callable[[], Tensor]) -> Tensor:
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    return call


def inputs(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens), dtype=torch.float32)


@pytest.mark.parametrize("method", ["arb", "arb-rc", "arb-rcx"])
def test_the_dtype_makes_no_difference_to_what_is_solved(by_default, method):
    weight, seen = inputs(48, 40), inputs(200, 40)
    hessian = seen.T @ seen
    config = arbllm.BinarizationConfig(method, block_size=16)

    def solved() -> Tensor:
        return arbllm.quantize_matrix(weight, hessian, config).dequantize(torch.float32)

    assert torch.equal(by_default(solved), solved())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("exact", [False, True])
def test_the_dtype_makes_no_difference_to_products(by_default, name, tokens, exact):
    matrix, x = MATRICES[name], inputs(tokens, MATRICES[name].layout.columns)
    exactly = inputs(tokens, matrix.layout.columns).requires_grad_()

    def product(x: Tensor) -> Tensor:
        layer = BinaryLinear.from_matrix(matrix)
        layer.exact = exact
        return layer(x).detach()

    for given in (x, x.bfloat16(), exactly):
        assert torch.equal(by_default(lambda given=given: product(given)), product(given))


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_dtype_makes_no_difference_to_a_head(by_default, tokens):
    head, x = Int8Linear.from_dense(nn.Linear(40, 300, bias=False)), inputs(tokens, 40)
    assert torch.equal(by_default(lambda: head(x)), head(x))


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_nor_does_the_device(tokens):
    head = Int8Linear.from_dense(nn.Linear(40, 300, bias=False))
    with torch.device("meta"):
        of_head = head(inputs_on_the_cpu := torch.ones(tokens, 40, device="cpu"))
    assert torch.equal(of_head, head(inputs_on_the_cpu))
    for matrix in MATRICES.values():
        layer, x = BinaryLinear.from_matrix(matrix), inputs(tokens, matrix.layout.columns)
        with torch.device("meta"):
            y = layer(x)
        assert torch.equal(y, BinaryLinear.from_matrix(matrix)(x))
