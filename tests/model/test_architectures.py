"""Every architecture through the whole life of a model: quantize, save, load, generate."""

import pytest
import torch
from torch import nn

import arbllm
from arbllm.config import BinarizationConfig
from arbllm.integrations.transformers import mark_packed
from arbllm.model.quantize import quantize_model
from arbllm.model.source import open_model_only
from arbllm.nn import BinaryLinear
from tests.model.tiny_models import MODELS, random_windows, tiny_model

CONFIG = BinarizationConfig(iterations=2)


def logits(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(windows).logits


@pytest.mark.parametrize("name", MODELS)
def test_quantize_save_load_generate(name, tmp_path):
    model, windows = tiny_model(name), random_windows()
    dense = logits(model, windows)
    results = quantize_model(model, windows, CONFIG)
    mark_packed(model, {"binarization": CONFIG.to_dict()})
    model.save_pretrained(tmp_path / "packed")
    loaded = arbllm.load(tmp_path / "packed")

    packed = {key for key, module in loaded.named_modules() if isinstance(module, BinaryLinear)}
    assert packed == {result.name for result in results}
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) and state[key].dtype == tensor.dtype for key, tensor in expected.items())
    quantized = logits(model, windows)
    torch.testing.assert_close(logits(loaded, windows), quantized, rtol=0, atol=0)
    # Binarized, yet calibrated: another model than before, but nearer to it than to nothing.
    assert 0.01 < (quantized - dense).norm() / dense.norm() < 1

    written = loaded.generate(windows[:1, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, 11)
    scores = logits(loaded, written[:, :-1])[0, -5:]
    scores[:, loaded.generation_config.eos_token_id] = -torch.inf  # as so many new tokens were asked for
    assert torch.equal(written[0, -5:], scores.argmax(-1))


@pytest.mark.parametrize("name", ["opt", "llama", "gemma3", "gpt2", "falcon-alibi", "qwen3-moe"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_come_back_as_they_were(name, dtype, tmp_path):
    # Not `.to(dtype)` alone: that would round rotary frequencies, which a model that is loaded keeps in float32.
    tiny_model(name).to(dtype).save_pretrained(tmp_path / "dense")
    model, windows = open_model_only(str(tmp_path / "dense")), random_windows()
    assert model.dtype == dtype
    quantize_model(model, windows, CONFIG)
    mark_packed(model, {"binarization": CONFIG.to_dict()})
    model.save_pretrained(tmp_path / "packed")
    loaded = arbllm.load(tmp_path / "packed")
    assert loaded.dtype == dtype
    torch.testing.assert_close(logits(loaded, windows), logits(model, windows), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3"])
def test_a_tied_head_stays_tied(name, tmp_path):
    model = tiny_model(name)
    quantize_model(model, random_windows(), CONFIG)
    mark_packed(model, {"binarization": CONFIG.to_dict()})
    model.save_pretrained(tmp_path / "packed")
    for tied in (model, arbllm.load(tmp_path / "packed")):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


PAPER = {"block_size": 16, "iterations": 2}
CONFIGS = [
    BinarizationConfig("billm", partition="column+group", **PAPER),
    BinarizationConfig("arb", partition="cgb", **PAPER),
    BinarizationConfig("arb-x", partition="cgb", **PAPER),
    BinarizationConfig("arb-rc", partition="cgb", groups=4, **PAPER),
    BinarizationConfig("arb-rc", partition="none", **PAPER),
    BinarizationConfig("arb-rcx", bits=1.9, iterations=2),
    BinarizationConfig("arb-rcx", bits=3.4, scale_block=16, iterations=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.partition}-{config.bits}")
def test_every_method_through_a_whole_model(config, tmp_path):
    model, windows = tiny_model("llama"), random_windows()
    quantize_model(model, windows, config)
    mark_packed(model, {"binarization": config.to_dict()})
    model.save_pretrained(tmp_path / "packed")
    torch.testing.assert_close(
        logits(arbllm.load(tmp_path / "packed"), windows), logits(model, windows), rtol=0, atol=0
    )
