"""Models that take images as well: their language model is packed, the rest stays as it is."""

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

import arbllm
from arbllm.config import BinarizationConfig
from arbllm.export import export
from arbllm.model.likelihood import log_likelihoods
from arbllm.model.perplexity import perplexity
from arbllm.model.source import PREPARATION_FILES, open_model_only
from arbllm.model.walk import find_blocks
from arbllm.nn import BinaryLinear
from tests.model.tiny_models import GROUPED, IMAGE_MODELS, VISION, image_inputs, randomize, tiny_image_model
from tests.tiny import END, VOCABULARY, byte_tokenizer

JOB = {"calibration": "builtin", "windows": 3, "window_length": 32, "device": "cpu"}
CONFIG = BinarizationConfig(bits=2.5, iterations=1, allocation="uniform")
TEXT = {"vocab_size": VOCABULARY, "eos_token_id": END, "pad_token_id": END, "max_position_embeddings": 128}


@pytest.fixture(scope="module", params=IMAGE_MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def dense(name, tmp_path_factory):
    directory = tmp_path_factory.mktemp(name) / "dense"
    tiny_image_model(name, **TEXT).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 16}).save_pretrained(directory)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return directory


@pytest.fixture(scope="module")
def packed(dense):
    arbllm.quantize(dense, dense.parent / "packed", config=CONFIG, tune=2, **JOB)
    return dense.parent / "packed"


def vision(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All that is not in the decoder blocks of the language model."""
    return {key: tensor for key, tensor in model.state_dict().items() if ".language_model.layers." not in key}


def take_packed_weights(dense: PreTrainedModel, packed: PreTrainedModel) -> None:
    """Give the decoder blocks of a dense model the weights and norms that a packed one has."""
    with torch.no_grad():
        for ours, theirs in zip(find_blocks(dense), packed.get_decoder().layers, strict=True):
            for key, module in theirs.named_modules():
                own: Any = ours.module.get_submodule(key)
                if isinstance(module, BinaryLinear):
                    own.weight.copy_(module.matrix.dequantize())
                elif isinstance(getattr(module, "weight", None), torch.Tensor):
                    own.weight.copy_(module.weight)


def test_blocks_are_those_of_the_language_model(name):
    blocks = find_blocks(tiny_image_model(name))
    assert [block.name for block in blocks] == [f"model.language_model.layers.{index}" for index in range(3)]
    experts = [f"experts.{number}.{x}_proj" for number in range(4) for x in ("gate_up", "down")]
    mlp = experts if name.endswith("moe") else ["gate_proj", "up_proj", "down_proj"]
    names = {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}" for x in mlp)}
    for block in blocks:
        assert {linear.name.removeprefix(f"{block.name}.") for linear in block.linears} == names


@torch.no_grad()
def test_a_packed_model_reads_images(name, dense, packed):
    original, loaded = open_model_only(str(dense)), arbllm.load(packed)
    assert type(loaded) is type(original) is type(tiny_image_model(name))
    packed_linears = {key for key, module in loaded.named_modules() if isinstance(module, BinaryLinear)}
    assert packed_linears == {linear.name for block in find_blocks(tiny_image_model(name)) for linear in block.linears}
    assert vision(loaded).keys() == vision(original).keys()
    assert all(torch.equal(tensor, vision(original)[key]) for key, tensor in vision(loaded).items())
    inputs = image_inputs(name)
    logits, other = loaded(**inputs).logits, loaded(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
    assert (logits - other).norm() > 0.05 * logits.norm()
    take_packed_weights(original, loaded)
    torch.testing.assert_close(logits, original(**inputs).logits, atol=1e-4, rtol=1e-4)
    again = AutoModelForImageTextToText.from_pretrained(packed)
    assert torch.equal(again(**inputs).logits, logits)


def test_what_prepares_images_goes_along(dense, packed):
    kept = {file for file in PREPARATION_FILES if (packed / file).exists()}
    assert kept == {file for file in PREPARATION_FILES if (dense / file).exists()}
    assert {"preprocessor_config.json", "chat_template.json"} <= kept
    assert all((packed / file).read_bytes() == (dense / file).read_bytes() for file in kept)


def test_the_card_names_the_class_that_opens_it(packed):
    card = (packed / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "`AutoModelForImageTextToText.from_pretrained` works too" in card


@torch.no_grad()
def test_export(name, packed, tmp_path):
    export(packed, tmp_path / "dense")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense")
    inputs = image_inputs(name)
    torch.testing.assert_close(opened(**inputs).logits, arbllm.load(packed)(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "dense" / "preprocessor_config.json").exists()


def test_a_streamed_job_makes_the_same_checkpoint(dense, packed, tmp_path):
    arbllm.quantize(dense, tmp_path / "packed", config=CONFIG, tune=2, stream=True, **JOB)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "packed" / file).read_bytes() == (packed / file).read_bytes()


def test_evaluation(packed):
    model = arbllm.load(packed)
    tokens = torch.randint(VOCABULARY, (96,), generator=torch.Generator().manual_seed(3))
    total = sum(float(model(window[None], labels=window[None]).loss.detach()) for window in tokens.view(3, 32))
    assert perplexity(model, tokens, 32).perplexity == pytest.approx(torch.tensor(total / 3).exp().item(), rel=1e-4)
    given, answers = tokens[:9].tolist(), [tokens[9:14].tolist(), tokens[20:23].tolist()]
    scored = log_likelihoods(model, [(given, answer) for answer in answers], longest=32)
    for answer, score in zip(answers, scored, strict=True):
        logits = model(torch.tensor([given + answer])).logits[0, 8:-1].log_softmax(-1)
        expected = logits[range(len(answer)), answer].sum().item()
        assert score[0] == pytest.approx(expected, rel=1e-3)


def test_where_transformers_knows_the_language_model_alone_it_is_opened_with_a_warning(tmp_path):
    changes = {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3}
    config = Qwen3_5Config(text_config={**GROUPED, **TEXT, **changes}, vision_config={**VISION, "depth": 1})
    model = randomize(Qwen3_5ForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"Qwen3_5ForCausalLM is opened.* Qwen3_5ForConditionalGeneration reads"):
        arbllm.quantize(tmp_path / "dense", tmp_path / "packed", config=CONFIG, **JOB)
    loaded = arbllm.load(tmp_path / "packed")
    assert type(loaded).__name__ == "Qwen3_5ForCausalLM"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    ids = torch.arange(20)[None]
    take_packed_weights(model, loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
