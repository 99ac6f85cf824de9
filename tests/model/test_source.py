import json
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2_5OmniConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from arbllm.config import BinarizationConfig
from arbllm.device import naming_lack_of_memory
from arbllm.errors import ArbllmError, CheckpointError, ConfigError, ModelError
from arbllm.integrations.auto import auto_class
from arbllm.integrations.transformers import mark_packed
from arbllm.model import source
from arbllm.model.quantize import quantize_model
from arbllm.model.source import open_model, open_model_only, open_tokenizer, save_tokenizer
from arbllm.nn import BinaryLinear
from tests.model.tiny_models import tiny_model
from tests.tiny import bring_own_code, byte_tokenizer, save_tiny, tiny_llama


@pytest.fixture
def unreachable_hub(monkeypatch):
    monkeypatch.setattr("arbllm.model.source.hub_is_reachable", lambda: False)


def test_a_local_directory(tmp_path):
    model, tokenizer = open_model(str(save_tiny(tmp_path)))
    windows = torch.tensor([tokenizer("some text")["input_ids"]])
    torch.testing.assert_close(model(windows).logits, tiny_llama()(windows).logits)
    assert not model.training


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_dtypes(tmp_path, stored, asked):
    tiny_llama().to(stored).save_pretrained(tmp_path)
    expected = stored if asked == "auto" else getattr(torch, asked)
    assert open_model_only(str(tmp_path), dtype=asked).dtype == expected


def test_an_unknown_dtype(tmp_path):
    with pytest.raises(ConfigError, match=r"int4.*auto, float32"):
        open_model_only(str(tmp_path), dtype="int4")


def test_a_packed_checkpoint(tmp_path):
    model, windows = tiny_llama(), torch.randint(257, (2, 16))
    quantize_model(model, windows, BinarizationConfig(block_size=16, iterations=1))
    mark_packed(model, {})
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    opened, _ = open_model(str(tmp_path))
    assert sum(isinstance(module, BinaryLinear) for module in opened.modules()) == 14
    torch.testing.assert_close(opened(windows).logits, model(windows).logits)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        open_model(str(tmp_path))


def write_gguf(path: Path) -> None:
    """The random LLaMA of `tiny_llama` in the layout of GGUF files; no tokenizer."""
    model = tiny_llama(num_key_value_heads=4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        values = tensor
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF interleaves the halves that rotary embedding pairs
            values = tensor.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_opens_dense_and_can_be_saved(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    model = open_model_only(str(tmp_path / "model.gguf"))
    assert model.dtype == torch.float16
    windows = torch.randint(257, (2, 16))
    dense = open_model_only(str(tmp_path / "model.gguf"), dtype="float32")
    torch.testing.assert_close(dense(windows).logits, tiny_llama(num_key_value_heads=4)(windows).logits)
    model.save_pretrained(tmp_path / "saved")
    again = open_model_only(str(tmp_path / "saved"))
    torch.testing.assert_close(again(windows).logits, model(windows).logits)


def test_a_directory_with_a_gguf_file_points_to_it(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"no config\.json.*model\.gguf"):
        open_model(str(tmp_path))


def test_a_path_that_leads_nowhere(tmp_path, unreachable_hub):
    for path in (tmp_path / "absent", "./absent", "absent.gguf"):
        with pytest.raises(ModelError, match=r"absent.*no such file"):
            open_model(str(path))


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match=r"model\.bin: not a \.gguf file"):
        open_model(str(tmp_path / "model.bin"))


def test_a_damaged_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError, match=r"model\.gguf: its model cannot be opened"):
        open_model_only(str(tmp_path / "model.gguf"))


def test_the_hub_out_of_reach_is_told_in_seconds(unreachable_hub):
    with pytest.raises(ModelError, match=r"nobody/nothing: .*the hub cannot be reached"):
        open_model("nobody/nothing")


def test_no_tokenizer(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "gpt2")
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    for kind in ("gpt2", "llama"):
        with pytest.raises(ModelError, match=f"{kind}: .*tokenizer"):
            open_tokenizer(str(tmp_path / kind))


def test_models_that_are_not_causal(tmp_path):
    T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=10)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="t5: not a causal language model"):
        open_model_only(str(tmp_path / "t5"))
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"bert: cls\..* is not in the checkpoint"):
        open_model_only(str(tmp_path / "bert"))


def test_a_missing_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not in the checkpoint"):
        open_model(str(tmp_path))


def test_an_unreadable_configuration(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"its config\.json cannot be read"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="no-such-model"):
        open_model_only(str(tmp_path))


def test_code_of_a_model_whose_classes_have_names_of_transformers(tmp_path):
    bring_own_code(save_tiny(tmp_path), config_class="LlavaConfig")
    for _ in range(2):  # the second time transformers has registered the class
        assert type(open_model_only(str(tmp_path), trust_remote_code=True)).__name__ == "CustomForCausalLM"
        with pytest.raises(ModelError, match="comes with code of its own; read it, and pass --trust-remote-code"):
            open_model_only(str(tmp_path))


def test_a_model_that_speaks_is_refused():
    with pytest.raises(
        ModelError, match="save its thinker by transformers' Qwen2_5OmniThinkerForConditionalGeneration"
    ):
        auto_class(Qwen2_5OmniConfig())


def test_templates_of_chats_stay_as_they_are(tmp_path):
    """Those of the tokenizer in its configuration, that of the processor in a file: no file of both, no other file."""
    source, out = save_tiny(tmp_path / "dense"), save_tiny(tmp_path / "out")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(source, save_jinja_files=False)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ images }}"}))
    save_tokenizer(open_tokenizer(str(source)), source, out)
    assert {file.name for file in out.iterdir() if "template" in file.name} == {"chat_template.json"}
    assert open_tokenizer(str(out)).chat_template == tokenizer.chat_template


def test_code_that_prepares_input_goes_along(tmp_path):
    source, out = save_tiny(tmp_path / "dense"), tmp_path / "out"
    (source / "images.py").write_text("from .sizes import SIZE\n")
    (source / "sizes.py").write_text("SIZE = 3\n")
    (source / "other.py").write_text("")
    (tmp_path / "outside.py").write_text("")
    prepares = {
        "AutoImageProcessor": "images.OwnImages",
        "AutoProcessor": "somebody/else--code.Processor",
        "AutoTokenizer": ["../outside.Slow", None],
    }
    (source / "preprocessor_config.json").write_text(json.dumps({"auto_map": prepares}))
    save_tokenizer(byte_tokenizer(), source, out)
    assert {file.name for file in out.glob("*.py")} == {"images.py", "sizes.py"}


def test_lack_of_memory_is_not_taken_for_a_model_that_is_wrong(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    save_tiny(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ArbllmError, match=r"out of memory.*--stream"), naming_lack_of_memory():
        open_model_only(str(tmp_path))


def test_files_that_the_hub_does_not_give_in_the_end_cost_a_warning_alone(tmp_path, monkeypatch):
    class AbsentError(EntryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    def fail(error):
        def download(*_, **__):
            raise error

        return download

    location = {"pretrained_model_name_or_path": "someone/model", "local_files_only": False}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail(LocalEntryNotFoundError("no connection")))
    with pytest.warns(UserWarning, match=r"processor_config\.json of someone/model could not be fetched"):
        assert source._beside_weights(location, "processor_config.json") is None
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail(AbsentError()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source._beside_weights(location, "processor_config.json") is None
