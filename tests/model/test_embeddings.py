"""Embeddings and head in 8 bits through the whole life of a model."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import arbllm
from arbllm.config import BinarizationConfig
from arbllm.embedding import Int8Embedding, Int8Linear
from arbllm.errors import CheckpointError, ConfigError, ModelError
from arbllm.export import dense_bytes
from arbllm.format.checkpoint import open_checkpoint
from arbllm.integrations.dense import dense_model
from arbllm.integrations.transformers import mark_packed
from arbllm.model.capture import capture_inputs
from arbllm.model.embeddings import quantize_embeddings
from arbllm.model.quantize import quantize_model
from arbllm.model.walk import find_blocks
from tests.helpers import pack_randomly
from tests.model.tiny_models import VOCABULARY, random_windows, tiny_model

CONFIG = BinarizationConfig(block_size=16, iterations=2)
NAMES = ["llama", "llama-tied", "gpt2", "gemma3", "opt-350m", "gpt-neox", "falcon"]
WINDOWS = random_windows()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOWS).logits


def packed_model(name: str) -> Any:
    """A model of random packed tensors, embeddings and head in 8 bits."""
    model = tiny_model(name)
    quantize_embeddings(model)
    return pack_randomly(model)


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().tied is model.get_input_embeddings()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of an untied and a tied model."""
    found = {}
    for name in ("llama", "llama-tied"):
        found[name] = tmp_path_factory.mktemp(name)
        packed_model(name).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_hardly_change(name):
    model = tiny_model(name)
    dense = logits(model)
    quantize_embeddings(model)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert 0 < (logits(model) - dense).norm() / dense.norm() < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_quantize_save_load_generate(name, tmp_path):
    model = tiny_model(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    quantize_embeddings(model)
    quantize_model(model, WINDOWS, CONFIG)
    mark_packed(model, {"binarization": CONFIG.to_dict()})
    model.save_pretrained(tmp_path / "packed")
    for reader in (arbllm.load, AutoModelForCausalLM.from_pretrained):
        loaded = reader(tmp_path / "packed")
        assert is_tied(loaded) == is_tied(model) == tied
        state, expected = loaded.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").checksums == open_checkpoint(tmp_path / "packed").checksums
    written = loaded.generate(WINDOWS[:1, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with torch.no_grad():
        scores = loaded(written[:, :-1]).logits[0, -5:]
    scores[:, loaded.generation_config.eos_token_id] = -torch.inf  # not before there are five new ones
    assert torch.equal(written[0, -5:], scores.argmax(-1))


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype, tmp_path):
    model = tiny_model(name).to(dtype)
    quantize_embeddings(model)
    assert model.get_input_embeddings()(WINDOWS).dtype == model.dtype == dtype
    quantize_model(model, WINDOWS, CONFIG)
    mark_packed(model, {"binarization": CONFIG.to_dict()})
    model.save_pretrained(tmp_path)
    loaded = arbllm.load(tmp_path)
    assert loaded.dtype == logits(loaded).dtype == dtype
    assert loaded.get_input_embeddings()(WINDOWS).dtype == dtype
    assert arbllm.load(tmp_path, dtype=torch.float32).get_input_embeddings()(WINDOWS).dtype == torch.float32


def test_every_byte_is_counted(saved):
    for name, matrices in (("llama", 2), ("llama-tied", 1)):
        checkpoint = open_checkpoint(saved[name])
        assert len(checkpoint.embeddings) == matrices
        assert checkpoint.size.embeddings == matrices * (32 * VOCABULARY + 2 * VOCABULARY)
        assert checkpoint.size.nbytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def test_config_names_them(saved):
    config = json.loads((saved["llama-tied"] / "config.json").read_text())["quantization_config"]
    assert config["embeddings"] == {"model.embed_tokens": {"rows": VOCABULARY, "columns": 32, "bits": 8}}


def test_calibration_sees_the_rounded_embedding():
    model = tiny_model("llama")
    dense = model.model.embed_tokens(WINDOWS)
    quantize_embeddings(model)
    hidden, _ = capture_inputs(model, find_blocks(model), WINDOWS, torch.device("cpu"))
    assert torch.equal(hidden, model.model.embed_tokens(WINDOWS))
    assert not torch.equal(hidden, dense)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("tensor", ["codes", "scales"])
def test_a_damaged_byte_is_refused(saved, name, tensor, tmp_path):
    stored = open_checkpoint(saved[name]).tensors[f"model.embed_tokens.{tensor}"]
    packed_model(name).save_pretrained(tmp_path)
    octets = bytearray((tmp_path / stored.file.name).read_bytes())
    octets[stored.start + 5] ^= 4
    (tmp_path / stored.file.name).write_bytes(octets)
    for reader in (arbllm.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            reader(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("change", ["removed", "resized"])
def test_a_config_of_something_else_is_refused(name, change, tmp_path):
    packed_model(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if change == "removed":
        del config["quantization_config"]["embeddings"]
    else:
        config["vocab_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    # transformers hands over a config of its own, so that only what does not fit is noticed there.
    messages = {
        arbllm.load: "other values describe the model",
        AutoModelForCausalLM.from_pretrained: r"is \[97, 32\] in the model, but \[96",
    }
    for reader, message in messages.items():
        with pytest.raises(CheckpointError, match="embeddings are not those" if change == "removed" else message):
            reader(tmp_path)


def test_codes_that_did_not_reach_the_model_are_refused(saved, monkeypatch):
    from transformers import core_model_loading

    original = core_model_loading.set_param_for_module

    def forgetful(model, target_name, *arguments, **options):
        if not target_name.endswith("embed_tokens.codes"):
            original(model, target_name, *arguments, **options)

    monkeypatch.setattr(core_model_loading, "set_param_for_module", forgetful)
    # The memory of a tensor that was not filled may by chance still hold the codes; then transformers' report tells.
    with pytest.raises(CheckpointError, match=r"embed_tokens\.codes(,| did not reach the model)"):
        arbllm.load(saved["llama-tied"])


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_model_without_its_head(saved, name, tmp_path):
    headless = AutoModel.from_pretrained(saved[name])
    expected = arbllm.load(saved[name]).model(WINDOWS).last_hidden_state
    torch.testing.assert_close(headless(WINDOWS).last_hidden_state, expected, rtol=0, atol=0)
    headless.save_pretrained(tmp_path)
    assert list(open_checkpoint(tmp_path).embeddings) == ["embed_tokens"]
    if name == "llama-tied":  # the head is the embedding's, so nothing is missing
        torch.testing.assert_close(logits(arbllm.load(tmp_path)), logits(arbllm.load(saved[name])), rtol=0, atol=0)


def test_shards(tmp_path):
    model = packed_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    torch.testing.assert_close(logits(arbllm.load(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_dense_again(name, tmp_path):
    model = packed_model(name)
    tied, expected, size = is_tied(model), logits(model), dense_bytes(model)
    kind = type(tiny_model(name).get_input_embeddings())
    dense_model(model).save_pretrained(tmp_path)
    assert sum(parameter.nbytes for parameter in model.parameters()) == size
    for dense in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == tied
        assert type(dense.get_input_embeddings()) is kind
        torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_is_independent():
    model = packed_model("llama-tied")
    expected, twin = logits(model), copy.deepcopy(model)
    model.model.embed_tokens.codes.zero_()
    torch.testing.assert_close(logits(twin), expected, rtol=0, atol=0)
    assert is_tied(twin)


@pytest.mark.parametrize("bits", [4, 32, "8", None])
def test_other_bits_are_refused(bits, tmp_path):
    with pytest.raises(ConfigError, match="--embeddings"):
        quantize_embeddings(tiny_model("llama"), bits)
    with pytest.raises(ConfigError, match="embedding_bits"):
        arbllm.quantize("nowhere", tmp_path / "out", embedding_bits=bits)


def test_sixteen_bits_leave_all_as_it_is():
    model = tiny_model("llama")
    quantize_embeddings(model, 16)
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_what_cannot_be_rounded_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match="lm_head: its weight has NaN"):
        quantize_embeddings(model)
    model = tiny_model("llama")
    model.model.embed_tokens = nn.EmbeddingBag(VOCABULARY, 32)
    with pytest.raises(ModelError, match=r"model\.embed_tokens: EmbeddingBag cannot be rounded"):
        quantize_embeddings(model)


def test_a_head_tied_unknown_to_transformers_is_rounded_by_itself(tmp_path):
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    quantize_embeddings(model)
    pack_randomly(model).save_pretrained(tmp_path)
    assert set(open_checkpoint(tmp_path).embeddings) == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(logits(arbllm.load(tmp_path)), logits(model), rtol=0, atol=0)
