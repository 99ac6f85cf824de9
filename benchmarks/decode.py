"""Tokens a second on a CPU, one at a time with a static cache: packed against bfloat16 and float32, beside llama.cpp.

    python benchmarks/decode.py [--threads 2] [--bits 2.25] [--tokens 24] [--repeats 3] [--page]

Weights are random: they make no difference to the speed. All models run the same code of transformers but for their
linears. Of the LLaMA-7B as many blocks are measured as tell what a block costs, the rest is calculated.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from statistics import median

import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from arbllm.nn import BinaryLinear
from commands import demonstration_model
from kernels import machine
from random_matrices import random_matrix
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

HEADINGS = ("model", "linears", "tokens a second", "spread", "x bfloat16", "x float32")
SHAPES = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
    "LLaMA-7B": {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32_000, "tie_word_embeddings": False,
    },
}  # fmt: skip
MEASURED_BLOCKS = {"SmolLM2-135M": (30,), "LLaMA-7B": (1, 2)}
WARM_UP = 3
COMMAND = "python benchmarks/decode.py --page"

_SECTION = """\
## Writing tokens on a CPU

One text, one token at a time, greedily, with a static cache, {threads} threads, eager transformers; linears of the
blocks dense or packed at {bits:g} bits a weight, embedding and head dense. Medians of {repeats} runs of {tokens} tokens
in which the contestants take turns; the spread is from the least to the greatest. Weights are random. Of LLaMA-7B one
block and two blocks are measured, and 30 more times the difference is added.

{machine}

{table}

{peer}

`{command}` writes this section.
"""


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the kernel")
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--tokens", type=int, default=24, help="of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    rows: Rows = []
    for name in options.models:
        rows += contest(name, options.bits, options.tokens, options.repeats)
    console.print(as_table(HEADINGS, rows))
    peer = llama_cpp(options.threads, options.tokens, options.repeats)
    console.print(peer)
    if options.page:
        text = _SECTION.format(
            threads=options.threads, bits=options.bits, repeats=options.repeats, tokens=options.tokens,
            machine=machine(), table=as_markdown(HEADINGS, rows), peer=peer, command=COMMAND,
        )  # fmt: skip
        write_section(PERFORMANCE, "tokens on a CPU", text)
        console.print(f"wrote {PERFORMANCE}")


def contest(name: str, bits: float, tokens: int, repeats: int) -> Rows:
    """A model with dense linears of two dtypes, and packed."""
    blocks = MEASURED_BLOCKS[name]
    models = {
        (linears, count): make_model(name, count, linears, bits)
        for linears in ("bfloat16", "float32", "packed")
        for count in blocks
    }
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in models}
    for _ in range(repeats):
        for key, model in models.items():
            seconds[key].append(seconds_a_token(model, tokens))
    whole = {}
    for linears in ("bfloat16", "float32", "packed"):
        first, last = (seconds[linears, count] for count in (blocks[0], blocks[-1]))
        more = SHAPES[name]["num_hidden_layers"] - blocks[-1]
        steps = max(1, blocks[-1] - blocks[0])
        whole[linears] = sorted(b + more * (b - a) / steps for a, b in zip(first, last, strict=True))
    middle = {linears: median(found) for linears, found in whole.items()}
    return [
        (
            name,
            linears,
            f"{1 / middle[linears]:.2f}",
            f"{1 / found[-1]:.2f}-{1 / found[0]:.2f}",
            f"{middle['bfloat16'] / middle[linears]:.2f}",
            f"{middle['float32'] / middle[linears]:.2f}",
        )
        for linears, found in whole.items()
    ]


def make_model(name: str, blocks: int, linears: str, bits: float) -> LlamaForCausalLM:
    """A model with random weights; packed linears go with embeddings, norms and head in bfloat16."""
    dtype = torch.float32 if linears == "float32" else torch.bfloat16
    config = LlamaConfig(**{**SHAPES[name], "num_hidden_layers": blocks}, max_position_embeddings=2048)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if linears == "packed":
        for path, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                matrix = random_matrix(module.out_features, module.in_features, bits, torch.device("cpu"))
                model.model.set_submodule(path, BinaryLinear.from_matrix(matrix))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                random = torch.randn(parameter.shape, dtype=dtype) * 0.02
                setattr(module, key, nn.Parameter(random, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def seconds_a_token(model: LlamaForCausalLM, tokens: int) -> float:
    """Seconds of a token, after a few that do not count."""
    cache = StaticCache(config=model.config, max_cache_len=128)
    token = torch.ones(1, 1, dtype=torch.int64)
    start = 0.0
    for position in range(WARM_UP + tokens):
        if position == WARM_UP:
            start = time.perf_counter()
        place = torch.tensor([position])
        logits = model(token, past_key_values=cache, cache_position=place, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / tokens


def llama_cpp(threads: int, tokens: int, repeats: int) -> str:
    """What llama.cpp does with the demonstration model's GGUF file, in a sentence."""
    if find_spec("llama_cpp") is None:
        return "llama.cpp was not measured: `llama-cpp-python` is not installed."
    from llama_cpp import Llama

    path = demonstration_model()
    llama = Llama(str(path), n_ctx=256, n_threads=threads, verbose=False)

    def run() -> float:
        start = time.perf_counter()
        written = sum(1 for _ in zip(range(tokens), llama.generate([1], temp=0.0), strict=False))
        return written / (time.perf_counter() - start)

    speeds = sorted(run() for _ in range(repeats))
    return f"llama.cpp, {path.name}: {median(speeds):.1f} tokens a second ({speeds[0]:.1f}-{speeds[-1]:.1f})."


if __name__ == "__main__":
    main()
