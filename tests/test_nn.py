import copy

import pytest
import torch
from torch import nn

from arbllm.errors import CheckpointError
from arbllm.nn import BinaryLinear
from tests.helpers import random_matrix


@pytest.fixture(params=[("bitmap", 16), ("segments", 8), ("explicit", 8)])
def layer(request):
    ordering, scale_bits = request.param
    matrix = random_matrix(20, 30, salient=4, row_means=True, ordering=ordering, scale_bits=scale_bits)
    return BinaryLinear.from_matrix(matrix, torch.randn(20))


def packed_tensors(layer):
    return {name: tensor.clone() for name, tensor in layer.matrix.tensors().items()}


def assert_packed_as(layer, tensors):
    found = layer.matrix.tensors()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_the_dense_layer(layer, dtype):
    dense = nn.Linear(30, 20)
    dense.weight.data, dense.bias.data = layer.matrix.dequantize(), layer.bias.data.clone()
    x = torch.randn(2, 5, 30).to(dtype)
    y = layer.to(dtype)(x)
    assert y.dtype == dtype
    tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}  # sums in another order
    torch.testing.assert_close(y.float(), dense(x.float()), **tolerance)


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float32), lambda m: m.to("cpu")]
)
def test_casts_reach_the_bias_alone(layer, cast):
    before = packed_tensors(layer)
    moved = nn.Linear(1, 1)
    cast(nn.Sequential(layer, moved))
    assert_packed_as(layer, before)
    assert layer.bias.dtype == moved.bias.dtype


def test_to_empty_and_meta_keep_shapes_and_dtypes(layer):
    expected = layer.layout.tensors()
    for module in (layer.to("meta"), layer.half(), layer.to_empty(device="cpu")):
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in module.matrix.tensors().items()}
        assert found == expected
    assert not layer.signs.is_meta
    assert layer.bias.dtype == torch.float16


def test_state_dict_holds_the_packed_tensors_by_name(layer):
    state = layer.state_dict()
    assert list(state) == ["bias", *layer.layout.tensors()]
    fresh = BinaryLinear(layer.layout, bias=True)
    fresh.load_state_dict(state)
    assert_packed_as(fresh, packed_tensors(layer))
    assert torch.equal(fresh.bias, layer.bias)


def test_absent_parts_are_absent():
    layer = BinaryLinear.from_matrix(random_matrix(4, 16, groups=1, column_scaled=False))
    assert set(layer.state_dict()) == {"signs", "row_scales"}
    assert layer.bias is None


def test_shares_the_tensors_of_the_matrix():
    matrix = random_matrix(4, 16)
    assert BinaryLinear.from_matrix(matrix).matrix.signs.data_ptr() == matrix.signs.data_ptr()


def test_a_copy_is_independent(layer):
    twin = copy.deepcopy(layer)
    twin.signs.zero_()
    assert layer.signs.any()
    assert twin.layout == layer.layout


def test_a_wrong_buffer_is_named(layer):
    layer.row_scales = layer.row_scales.float()
    with pytest.raises(CheckpointError, match=r"row_scales: expected torch\.(float16|uint8)"):
        layer(torch.randn(1, 30))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (torch.ones(3, 30, dtype=torch.int64), r"torch\.int64 of shape \[3, 30\]"),
        (torch.ones(30, dtype=torch.complex64), r"torch\.complex64 of shape \[30\]"),
        (torch.tensor(1.0), r"torch\.float32 of shape \[\]"),
    ],
)
def test_inputs_of_another_kind_are_refused(layer, inputs, found, requires_grad):
    inputs = inputs.clone().requires_grad_(requires_grad and inputs.dtype != torch.int64)
    with pytest.raises(ValueError, match=f"must be floating-point vectors, not {found}"):
        layer(inputs)


@pytest.mark.parametrize("shape", [(0, 31), (3, 0), (2, 0, 31), (2, 29)])
def test_inputs_of_another_width_are_refused_even_without_tokens(layer, shape):
    with pytest.raises(ValueError, match=f"inputs have {shape[-1]} columns, the packed weight has 30"):
        layer(torch.empty(shape))
    assert layer(torch.empty(2, 0, 30)).shape == (2, 0, 20)


@pytest.mark.parametrize("place", [-1, 30, 32767])
def test_an_order_of_columns_that_are_not_there_is_refused(place):
    layer = BinaryLinear.from_matrix(random_matrix(20, 30, salient=4, ordering="explicit"))
    layer.load_state_dict({**layer.state_dict(), "column_order": torch.full_like(layer.column_order, place)})
    with pytest.raises(CheckpointError, match="column_order does not hold every column once"):
        layer(torch.ones(30))


def test_printed_form_tells_sizes_and_bits(layer):
    assert "in_features=30, out_features=20, bias=True, nominal_bits=1.13" in repr(layer)


def test_nothing_is_trainable(layer):
    assert not any(parameter.requires_grad for parameter in layer.parameters())
