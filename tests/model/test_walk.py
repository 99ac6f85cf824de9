import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from arbllm.errors import ModelError
from arbllm.model.walk import check_weights, find_blocks, replace_module
from arbllm.nn import BinaryLinear
from tests.helpers import random_matrix
from tests.model.tiny_models import MIXTURES, MODELS, tiny_model

# Linears of one block, as the architectures are known to have them.
LINEARS = {
    "opt": ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    "llama": [f"self_attn.{letter}_proj" for letter in "qkvo"]
    + [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt-neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "falcon": [
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in MIXTURES])
def test_all_blocks_and_linears_are_found(name):
    model = tiny_model(name)
    blocks = find_blocks(model)
    assert [block.index for block in blocks] == [0, 1, 2]
    family = "llama" if name in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3") else name
    family = next(known for known in (family, *LINEARS) if known in LINEARS and family.startswith(known))
    for block in blocks:
        assert model.get_submodule(block.name) is block.module
        names = [linear.name.removeprefix(block.name + ".") for linear in block.linears]
        assert sorted(names) == sorted(LINEARS[family])
    found = {linear.module for block in blocks for linear in block.linears}
    left = {
        key for key, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module not in found
    }
    projections = {"model.decoder.project_in", "model.decoder.project_out"} if name == "opt-350m" else set()
    assert (
        left
        == {next(key for key, module in model.named_modules() if module is model.get_output_embeddings())} | projections
    )


def test_every_expert_has_linears():
    attention = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    experts = [f"mlp.experts.{number}.{name}" for number in range(4) for name in ("gate_up_proj", "down_proj")]
    for block in find_blocks(tiny_model("mixtral")):
        routed = {linear.name.removeprefix(f"{block.name}."): linear.routed for linear in block.linears}
        assert routed == dict.fromkeys(attention, False) | dict.fromkeys(experts, True)


@pytest.mark.parametrize(
    ("name", "router"), [("phimoe", "mlp.router"), ("hunyuan-moe", "mlp.gate.wg"), ("afmoe", "mlp.router.gate")]
)
def test_routers_stay_dense(name, router):
    block = find_blocks(tiny_model(name))[2]
    assert isinstance(block.module.get_submodule(router), nn.Linear)
    names = {linear.name.removeprefix(f"{block.name}.") for linear in block.linears}
    assert router not in names
    assert {"self_attn.q_proj", "mlp.experts.7.down_proj"} <= names


def test_weights_are_outputs_by_inputs():
    linear = find_blocks(tiny_model("gpt2"))[0].linears[0]
    assert linear.transposed
    assert linear.weight.shape == (96, 32)
    assert linear.weight.data_ptr() == linear.module.weight.data_ptr()
    linear.set_weight(torch.arange(96.0 * 32).view(96, 32))
    assert linear.module.weight[1, 0] == 1
    assert torch.equal(linear.weight, torch.arange(96.0 * 32).view(96, 32))


def test_a_linear_is_replaced_by_name():
    model = tiny_model("llama")
    replace_module(model, "model.layers.1.mlp.down_proj", nn.Identity())
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Identity)


def test_an_encoder_decoder_is_refused():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=10)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_blocks(T5ForConditionalGeneration(config))


def test_an_encoder_decoder_inside_of_another_model_is_refused():
    model = tiny_model("llama")
    model.config.get_text_config = lambda **_: T5Config()
    with pytest.raises(ModelError, match="LlamaForCausalLM is an encoder-decoder"):
        find_blocks(model)


def test_a_model_that_does_not_read_text_alone_is_refused():
    config = Blip2Config(
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        qformer_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        text_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "ffn_dim": 8,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 8,
        },
    )
    with pytest.raises(
        ModelError, match="Blip2ForConditionalGeneration does not read text alone: it demands pixel_values"
    ):
        find_blocks(Blip2ForConditionalGeneration(config))


def test_a_model_without_blocks_of_linears_is_refused_with_what_was_found():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    with pytest.raises(ModelError, match=r"model\.layers \(2 x LayerNorm\)"):
        find_blocks(model)


def test_a_binarized_model_is_refused():
    model = tiny_model("llama")
    replace_module(model, "model.layers.1.mlp.down_proj", BinaryLinear.from_matrix(random_matrix(32, 56)))
    with pytest.raises(ModelError, match="binarized already"):
        find_blocks(model)


def test_a_model_quantized_by_others_is_refused():
    model = tiny_model("llama")
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantized already"):
        find_blocks(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_layer_with_a_bad_weight_is_named(value):
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj: .*NaN"):
        check_weights(find_blocks(model))


def test_weights_that_are_not_in_memory_or_not_floats_are_named():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: .*offloading"):
        check_weights(find_blocks(model))
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(
        torch.zeros(32, 4, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: .*unquantized"):
        check_weights(find_blocks(model))


def test_a_weight_of_two_linears_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ModelError, match=r"layers\.2\.mlp\.up_proj shares its weight with model\.layers\.0\.mlp\.up_proj"
    ):
        check_weights(find_blocks(model))


def test_narrow_linears_stay_dense():
    model = tiny_model("llama")
    model.model.layers[1].gate = nn.Linear(32, 7)
    assert "model.layers.1.gate" not in {linear.name for block in find_blocks(model) for linear in block.linears}
    model.model.layers[1].gate = nn.Linear(32, 8)
    assert "model.layers.1.gate" in {linear.name for block in find_blocks(model) for linear in block.linears}


def test_a_block_without_linears_is_refused():
    model = tiny_model("llama")
    model.model.layers[1] = nn.Identity()
    with pytest.raises(ModelError, match=r"model\.layers\.1 has no linear layers"):
        find_blocks(model)


def test_a_block_that_would_stay_mostly_dense_is_refused():
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.register_buffer("unknown", torch.ones(4))  # so that they cannot be split
    with pytest.raises(ModelError, match=r"model\.layers\.0: most of its weights .*mlp\.experts\.gate_up_proj"):
        check_weights(find_blocks(model))
