import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import arbllm
from arbllm.errors import CheckpointError, ConfigError
from arbllm.export import dense_bytes, export
from arbllm.format.checkpoint import bytes_on_disk
from arbllm.model.source import open_model_only
from arbllm.nn import BinaryLinear
from tests.model.test_source import write_gguf
from tests.tiny import VOCABULARY, byte_tokenizer, pack_tiny

TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_tiny(tmp_path_factory.mktemp("tiny"))


def test_an_ordinary_checkpoint_with_the_same_logits(packed, tmp_path):
    export(packed, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, BinaryLinear) for module in dense.modules())
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("a")["input_ids"]
    torch.testing.assert_close(dense(TOKENS).logits, arbllm.load(packed)(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_a_gguf_file_becomes_an_ordinary_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    write_gguf(file)
    # The tiny file has no tokenizer.
    monkeypatch.setattr(
        "arbllm.export.open_model", lambda path, dtype, **_: (open_model_only(path, dtype), byte_tokenizer())
    )
    export(file, tmp_path / "dense", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense(TOKENS).logits, open_model_only(str(file), "float32")(TOKENS).logits)


def test_conv1d_and_bias_come_back(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=None, eos_token_id=256))
    for module in model.transformer.h.modules():
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias)
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    options = {"calibration": "builtin", "windows": 4, "window_length": 64, "device": "cpu"}
    arbllm.quantize(tmp_path / "source", tmp_path / "packed", **options)
    export(tmp_path / "packed", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.transformer.h[0].mlp.c_fc) is type(model.transformer.h[0].mlp.c_fc)
    torch.testing.assert_close(
        dense(TOKENS).logits, arbllm.load(tmp_path / "packed")(TOKENS).logits, atol=1e-5, rtol=1e-5
    )


def test_dtype_and_size(packed, tmp_path):
    export(packed, tmp_path / "dense", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = dense_bytes(arbllm.load(packed, dtype=torch.bfloat16))
    assert bytes_on_disk(tmp_path / "dense") == pytest.approx(expected, rel=0.05)


def test_the_model_can_be_quantized_again(packed, tmp_path):
    export(packed, tmp_path / "dense")
    options = {"calibration": "builtin", "windows": 2, "window_length": 32, "device": "cpu"}
    assert arbllm.quantize(tmp_path / "dense", tmp_path / "again", **options).linears == 14


def test_a_dense_model_is_not_a_packed_checkpoint(packed, tmp_path):
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        export(packed.parent / "dense", tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_not_its_own_output(packed):
    with pytest.raises(ConfigError, match="is itself what is read"):
        export(packed, packed, overwrite=True)
