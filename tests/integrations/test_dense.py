import pytest
import torch

import arbllm
from arbllm.integrations.dense import dense_model
from arbllm.nn import BinaryLinear
from tests.tiny import pack_tiny

TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_tiny(tmp_path_factory.mktemp("tiny"))


def test_in_memory(packed):
    model = arbllm.load(packed)
    assert dense_model(model, torch.float16) is model
    assert model.dtype == torch.float16
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


def test_by_the_name_that_transformers_has_for_it(packed):
    expected, model = arbllm.load(packed)(TOKENS).logits, arbllm.load(packed)
    model.dequantize()
    assert not any(isinstance(module, BinaryLinear) for module in model.modules())
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_rotary_frequencies_stay_precise(packed):
    model = dense_model(arbllm.load(packed), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_what_is_kept_in_single_precision_stays_so(packed):
    model = arbllm.load(packed, dtype=torch.bfloat16)
    norm = model.model.norm
    norm.weight.data = torch.randn(norm.weight.shape)
    before = norm.weight.data.clone()
    dense_model(model)
    assert torch.equal(norm.weight, before)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
