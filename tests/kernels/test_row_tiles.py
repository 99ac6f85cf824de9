import pytest
import torch
from torch.library import opcheck

from arbllm.format.rows import dequantize_rows, quantize_rows
from arbllm.kernels import row_tiles

OPERATORS = torch.ops.arbllm


def weight(height, width):
    return quantize_rows(torch.randn(height, width, generator=torch.Generator().manual_seed(height)))


def inputs(tokens, width, dtype=torch.float32):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.fixture(params=[1, 70, 2**20], ids="tiles of {} weights".format)
def tile_weights(request, monkeypatch):
    monkeypatch.setattr(row_tiles, "CPU_TILE_WEIGHTS", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.usefixtures("tile_weights")
def test_products_and_gradients_are_those_of_the_dense_weight(tokens, dtype):
    codes, scales = weight(50, 23)
    dense = dequantize_rows(codes, scales, torch.float64)
    x = inputs(tokens, 23, dtype).requires_grad_()
    y, given = row_tiles.multiply(x, codes, scales), inputs(tokens, 50, dtype)
    y.backward(given)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-12)
    for found, expected in ((y, x.double() @ dense.T), (x.grad, given.double() @ dense)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=4 * eps, atol=40 * eps)


def test_gradients_are_true():
    codes, scales = weight(9, 5)
    x = inputs(3, 5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: row_tiles.multiply(x, codes, scales), (x,))


@pytest.mark.parametrize("tokens", [3, 40])
def test_derivatives_of_all_kinds(tokens):
    codes, scales = weight(9, 5)
    dense, x, change = dequantize_rows(codes, scales), inputs(tokens, 5), inputs(tokens, 5)
    y, moved, *_ = torch.func.jvp(lambda x: row_tiles.multiply(x, codes, scales), (x,), (change,))
    torch.testing.assert_close((y, moved), (x @ dense.T, change @ dense.T))
    gradient = torch.func.grad(lambda x: row_tiles.multiply(x, codes, scales).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * x @ dense.T @ dense)


@pytest.mark.filterwarnings("error")
def test_gradients_of_gradients_are_true():
    codes, scales = weight(9, 5)
    x = inputs(3, 5, torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: row_tiles.multiply(x, codes, scales).square(), (x,))


def test_autocast_makes_no_difference():
    codes, scales = weight(50, 23)
    x = inputs(40, 23)
    with torch.autocast("cpu", torch.bfloat16):
        y = row_tiles.multiply(x, codes, scales)
    assert torch.equal(y, row_tiles.multiply(x, codes, scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators(dtype):
    codes, scales = weight(10, 64)
    for tokens in (2, 20):
        x = inputs(tokens, 64, dtype).requires_grad_()
        opcheck(OPERATORS.row_tiles_matmul.default, (x, codes, scales))
        opcheck(OPERATORS.row_tiles_transposed.default, (inputs(tokens, 10, dtype), codes, scales))


def test_a_compiler_sees_one_step_however_many_tiles_there_are(monkeypatch):
    monkeypatch.setattr(row_tiles, "CPU_TILE_WEIGHTS", 64)
    codes, scales = weight(100, 64)
    graphs = []

    def keep(graph, _):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x = inputs(20, 64)
    y = torch.compile(row_tiles.multiply, backend=keep, fullgraph=True)(x, codes, scales)
    assert torch.equal(y, row_tiles.multiply(x, codes, scales))
    assert [len(graph) for graph in graphs] == [1]


def test_other_devices_follow_shapes():
    codes, scales = (part.to("meta") for part in weight(10, 64))
    assert row_tiles.multiply(torch.empty(3, 64, device="meta"), codes, scales).shape == (3, 10)
