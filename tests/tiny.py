"""A model and a tokenizer small enough to quantize in a test."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import arbllm
from tests.model.tiny_models import tiny_model

OWN_CODE = """
from transformers import LlamaForCausalLM
from transformers import LlamaConfig as Base
class {config}(Base):
    model_type = "custom"
class CustomForCausalLM(LlamaForCausalLM):
    config_class = {config}
"""
VOCABULARY = 257
END = 256


def tiny_llama(layers: int = 2, **changes) -> PreTrainedModel:
    """A random LLaMA of two layers of width 32 over the bytes of `byte_tokenizer`."""
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_tiny(directory: Path, **changes) -> Path:
    """The model and its tokenizer as a Hugging Face checkpoint."""
    tiny_llama(**changes).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def bring_own_code(directory: Path, config_class: str = "CustomConfig") -> Path:
    """Give a checkpoint of `save_tiny` classes of its own, in custom.py beside it."""
    classes = {"AutoConfig": f"custom.{config_class}", "AutoModelForCausalLM": "custom.CustomForCausalLM"}
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "custom", "architectures": ["CustomForCausalLM"], "auto_map": classes}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "custom.py").write_text(OWN_CODE.format(config=config_class))
    return directory


def save_tiny_mixture(directory: Path) -> Path:
    """A random Mixtral of three layers of four experts, of which each token gets two, with the same tokenizer."""
    options = {"vocab_size": VOCABULARY, "eos_token_id": END, "pad_token_id": END, "max_position_embeddings": 128}
    tiny_model("mixtral", **options).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def pack_tiny(directory: Path, **changes) -> Path:
    """The model quantized on the built-in text: `directory`/packed, beside its source `directory`/dense."""
    save_tiny(directory / "dense", **changes)
    options = {"calibration": "builtin", "windows": 4, "window_length": 64, "device": "cpu"}
    arbllm.quantize(directory / "dense", directory / "packed", **options)
    return directory / "packed"
