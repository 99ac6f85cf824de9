import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from arbllm.errors import ConfigError
from arbllm.format import bitplanes
from arbllm.nn import BinaryLinear
from tests.helpers import random_matrix

WEIGHT = random_matrix(20, 30, salient=4).dequantize()


@pytest.fixture
def layer():
    return BinaryLinear.from_matrix(random_matrix(20, 30, salient=4))


@pytest.fixture
def x():
    return torch.randn(3, 30, generator=torch.Generator().manual_seed(0))


def assert_product(y, x):
    torch.testing.assert_close(y, x @ WEIGHT.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepared_before", [False, True])
def test_a_recorded_layer_computes_with_its_weight(layer, x, prepared_before):
    if prepared_before:
        layer(x)
    graph = make_fx(lambda inputs: layer(inputs))(x)
    assert_product(graph(2 * x), 2 * x)


@pytest.mark.parametrize("strict", [False, True])
def test_layers_are_exported(layer, x, strict):
    bitplanes._kept_octets.cache_clear()
    layer.exact = True
    assert_product(torch.export.export(layer, (x,), strict=strict).module()(2 * x), 2 * x)
    assert_product(layer(x), x)


def test_layers_are_transformed(layer, x):
    assert_product(torch.vmap(layer)(x), x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), WEIGHT, rtol=1e-4, atol=1e-4)
    y, change, *_ = torch.func.jvp(layer, (x,), (2 * x,))
    assert_product(y, x)
    assert_product(change, 2 * x)


def test_derivatives_in_forward_mode(layer, x):
    with forward_ad.dual_level():
        y, change = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, 2 * x)))
    assert_product(y, x)
    assert_product(change, 2 * x)


def test_a_mode_without_data_leaves_nothing_behind(layer, x):
    bitplanes._kept_octets.cache_clear()
    with FakeTensorMode() as mode:
        made = BinaryLinear.from_matrix(layer.matrix.map(mode.from_tensor))
        assert made(mode.from_tensor(x)).shape == (3, 20)
    torch.testing.assert_close(layer.matrix.dequantize(), WEIGHT)


def test_what_cannot_be_followed_is_refused(layer, x):
    with pytest.raises(ConfigError, match=r"torch\.jit\.trace cannot follow packed layers; use torch\.compile"):
        torch.jit.trace(layer, x)
