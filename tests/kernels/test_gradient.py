import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from arbllm.format.layout import Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import cpu, reference
from arbllm.nn import BinaryLinear
from tests.helpers import in_segments, random_matrix

MATRICES = {
    "groups": random_matrix(33, 70),
    "means": random_matrix(65, 40, salient=20, row_means=True, column_scaled=False),
    "many rows": random_matrix(300, 576, salient=30, scale_bits=8, ordering="segments"),
    "a trellis": in_segments(70, *(Segment(60 + terms, 1, terms, True) for terms in (3, 1, 4, 2)), ordering="explicit"),
}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=MATRICES)
def matrix(request) -> BinaryMatrix:
    return MATRICES[request.param]


@pytest.fixture(params=["the C++ kernel", "PyTorch alone"])
def kernel(request, monkeypatch):
    if request.param == "PyTorch alone":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("arbllm was installed without its C++ kernels")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 17)], ids=str)
@pytest.mark.usefixtures("kernel")
def test_gradients_are_those_of_the_dense_weight(matrix, shape, dtype):
    layer = BinaryLinear.from_matrix(matrix, bias=random(matrix.layout.rows, dtype=dtype))
    x = random(*shape, matrix.layout.columns, dtype=dtype).requires_grad_()
    given = random(*shape, matrix.layout.rows, dtype=dtype)
    y = layer(x)
    y.backward(given)
    dense = matrix.dequantize().double()
    for found, expected in ((y, x.double() @ dense.T + layer.bias.double()), (x.grad, given.double() @ dense)):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert (found - expected).norm() <= ROUNDING[dtype] * expected.norm()


@pytest.mark.usefixtures("kernel")
def test_inputs_and_gradients_need_not_be_contiguous(matrix):
    layer = BinaryLinear.from_matrix(matrix)
    x = random(matrix.layout.columns, 5).T.requires_grad_()
    given = random(matrix.layout.rows, 5).T
    layer(x).backward(given)
    torch.testing.assert_close(x.grad, given @ matrix.dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernel")
def test_no_dense_weight_is_kept_for_the_backward_pass():
    layer = BinaryLinear.from_matrix(MATRICES["many rows"])
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(random(20, 576).requires_grad_())
    assert sum(kept) < 20 * 576


def test_the_gradient_is_that_of_the_weight_which_the_forward_pass_had(kernel):
    layer = BinaryLinear.from_matrix(MATRICES["groups"].map(torch.clone))
    x, given = random(3, 70).requires_grad_(), random(3, 33)
    y, weight = layer(x), layer.matrix.dequantize()
    layer.signs = ~layer.get_buffer("signs")
    y.backward(given)
    torch.testing.assert_close(x.grad, given @ weight, rtol=1e-4, atol=1e-4)


def test_gradients_are_true(matrix):
    x = random(2, matrix.layout.columns, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(BinaryLinear.from_matrix(matrix), (x,))


def test_transposed_products_undo_the_order_of_columns(matrix):
    y, dense = random(4, matrix.layout.rows), matrix.dequantize()
    torch.testing.assert_close(reference.multiply_transposed(y, matrix), y @ dense, rtol=1e-4, atol=1e-4)
    if cpu.available():
        found = cpu.multiply_transposed(y, cpu.prepare(matrix), matrix.layout.columns)
        torch.testing.assert_close(found, y @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", [(3, 70), (2, 3, 70), (70,)])
def test_outputs_may_be_changed_in_place(shape):
    layer = BinaryLinear.from_matrix(MATRICES["groups"])
    x, given = random(*shape).requires_grad_(), random(*shape[:-1], 33)
    y = layer(x)
    y *= 2
    y.backward(given)
    torch.testing.assert_close(x.grad, 2 * given @ layer.matrix.dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernel")
def test_gradients_of_gradients():
    layer = BinaryLinear.from_matrix(MATRICES["groups"])
    weight = layer.matrix.dequantize()
    x, along = random(3, 70).requires_grad_(), random(3, 70)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient, x, along)
    torch.testing.assert_close(second, 2 * along @ weight.T @ weight, rtol=1e-3, atol=1e-3)


def test_compiled_layers_have_gradients_too():
    layer = BinaryLinear.from_matrix(MATRICES["groups"])
    x, given = random(3, 70).requires_grad_(), random(3, 33)
    torch.compile(layer)(x).backward(given)
    torch.testing.assert_close(x.grad, given @ layer.matrix.dequantize(), rtol=1e-4, atol=1e-4)
