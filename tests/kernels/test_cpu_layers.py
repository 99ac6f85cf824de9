"""Layers that compute with the CPU kernel: when they prepare their weight, and what they leave to others."""

import copy
import pickle
import warnings

import pytest
import torch

from arbllm.kernels import cpu
from arbllm.nn import BinaryLinear
from tests.helpers import random_matrix
from tests.kernels.cpu_products import LARGEST_ERROR, inputs, relative_error

pytestmark = pytest.mark.skipif(not cpu.available(), reason="arbllm was installed without its C++ kernels")


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(BinaryLinear, "exact", False)
    return BinaryLinear.from_matrix(random_matrix(100, 320, salient=20), torch.randn(100))


def dense(layer, x):
    return x @ layer.matrix.dequantize().T + layer.bias


@pytest.mark.parametrize("prepared_before", [False, True])
def test_layer_compiles(layer, prepared_before):
    x = inputs(2, 320)
    if prepared_before:
        layer(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_model_compiles_as_one_graph():
    """Before its first run, too: a graph that ends at each layer is several times slower."""
    layers = torch.nn.Sequential(*(BinaryLinear.from_matrix(random_matrix(64, 64, salient=4)) for _ in range(12)))
    x = inputs(1, 64)
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layers(x))


def test_layer_computes_in_eight_bits_unless_told_not_to(layer):
    x = inputs(2, 320)
    assert 1e-4 < relative_error(layer(x), dense(layer, x)) < LARGEST_ERROR
    layer.exact = True
    assert relative_error(layer(x), dense(layer, x)) < 1e-5


def test_layer_prepares_once(layer, monkeypatch):
    x, calls, original = inputs(2, 320), [], cpu.prepare

    def watched(matrix):
        calls.append(matrix)
        return original(matrix)

    monkeypatch.setattr(cpu, "prepare", watched)
    for _ in range(3):
        layer(x)
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["write", "replace", "load", "load in inference mode", "move"])
def test_layer_prepares_again_after_a_change(layer, change):
    x = inputs(2, 320)
    layer(x)
    if change == "write":
        layer.signs.bitwise_not_()
    elif change == "replace":
        layer.signs = layer.signs.bitwise_not()
    elif change == "load":
        layer.load_state_dict({**layer.state_dict(), "signs": layer.signs.bitwise_not()})
    elif change == "load in inference mode":
        with torch.inference_mode():
            layer = BinaryLinear.from_matrix(layer.matrix.map(torch.clone), layer.bias)
            layer(x)
            layer.load_state_dict({**layer.state_dict(), "signs": layer.signs.bitwise_not()})
    else:
        layer.to("meta")
        layer.to_empty(device="cpu")
        layer.load_state_dict(
            BinaryLinear.from_matrix(random_matrix(100, 320, salient=20, seed=1), torch.ones(100)).state_dict()
        )
    assert relative_error(layer(x), dense(layer, x)) < LARGEST_ERROR


def test_copies_and_pickles_compute_on_their_own(layer):
    x = inputs(2, 320)
    y = layer(x)
    twin = copy.deepcopy(layer)
    twin.signs.bitwise_not_()
    assert torch.equal(layer(x), y)
    assert relative_error(twin(x), dense(twin, x)) < LARGEST_ERROR
    assert len(pickle.dumps(layer)) < 2 * layer.matrix.nbytes + 10_000
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


def test_layer_of_inference_tensors(layer):
    with torch.inference_mode():
        fresh = BinaryLinear.from_matrix(layer.matrix.map(torch.clone), layer.bias)
        x = inputs(2, 320)
        assert torch.equal(fresh(x), layer(x))


def test_without_the_extension_layers_compute_all_the_same(layer, monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: None)
    cpu.native.cache_clear()
    try:
        x = inputs(2, 320)
        with pytest.warns(UserWarning, match="without its C\\+\\+ kernels"):
            y = layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            layer(x)
        torch.testing.assert_close(y, dense(layer, x))
        assert cpu.instruction_sets() == []
    finally:
        cpu.native.cache_clear()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 32), (2, 400), (20, 32), (20, 400)])
def test_inputs_of_another_width_are_refused(layer, tokens, columns, exact):
    layer.exact = exact
    with pytest.raises(ValueError, match=f"inputs have {columns} columns, the packed weight has 320"):
        layer(torch.randn(tokens, columns))
    with pytest.raises(ValueError, match=f"inputs have {columns} columns, the packed weight has 320"):
        layer(torch.randn(tokens, columns, requires_grad=True))


def test_a_weight_on_another_device_is_refused(layer):
    layer.to("meta")
    with pytest.raises(ValueError, match="the packed weight is on meta, its input on the CPU"):
        layer(torch.randn(1, 320))


def test_a_layer_that_moves_lets_go_of_what_it_prepared(layer):
    layer(torch.randn(1, 320))
    prepared = layer._prepared
    assert layer.to("cpu")._prepared is prepared
    assert layer.to("meta")._prepared is None


def test_inputs_of_which_signs_are_still_to_be_changed(layer):
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))
    assert torch.equal(layer(torch._efficientzerotensor(x.shape)), layer(torch.zeros_like(x)))
