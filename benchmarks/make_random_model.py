"""Writes a model of random weights, one shard at a time: for trials of size, where what it says does not matter.

python benchmarks/make_random_model.py OUT --shape llama-7b
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEVIATION = 0.02
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 8},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def make(directory: Path, shape: str, seed: int = 0) -> int:
    """Write config.json, a tokenizer over the bytes and bfloat16 weights, a shard for each block and one for the rest.

    Returns:
        Bytes of all tensors.
    """
    vocabulary = 257 if shape == "tiny" else 32000
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, dtype="bfloat16", **SHAPES[shape])
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    with init_empty_weights():
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
    torch.manual_seed(seed)
    files: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = dict(_random(names, shapes))
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def _random(names: list[str], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Norms of ones, and matrices of normal deviates."""
    for name in names:
        ones = len(shapes[name]) == 1
        tensor = torch.ones(shapes[name]) if ones else torch.empty(shapes[name]).normal_(0, DEVIATION)
        yield name, tensor.bfloat16()


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> None:
    """Write the model, and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{options.directory}: {make(options.directory, options.shape, options.seed) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
