"""Tokens a second on a CPU, one at a time with a static cache: packed against bfloat16 and float32, beside llama.cpp.

    python benchmarks/decode.py [--threads 2] [--bits 2.25] [--tokens 16] [--repeats 4] [--page]

Weights are random: they make no difference to the speed. All models run the same code of transformers but for what is
packed, as it is and compiled (`torch.compile`). Of the LLaMA-7B as many blocks are measured as tell what a block
costs, the rest is calculated. llama.cpp is measured where `llama-cpp-python` is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from arbllm.format.rows import ROW_BITS
from arbllm.kernels import cpu
from arbllm.model.embeddings import quantize_embeddings
from arbllm.nn import BinaryLinear
from kernels import machine
from llama_cpp_peer import NO_PEER, PEER, PEER_HEADINGS, peers_of, writing
from random_matrices import random_matrix
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

HEADINGS = ("model", "linears", "loop", "tokens a second", "spread", "x bfloat16", "x float32")
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
MEASURED_BLOCKS = {"SmolLM2-135M": (30,), "LLaMA-7B": (1, 4)}
DENSE = ("bfloat16", "float32")
PACKED, PACKED_ALL = "packed", "packed, embeddings too"
LOOPS = ("eager", "compiled")
CACHE_LENGTH = 128
WARM_UP = 3
COMMAND = "python benchmarks/decode.py --page"

_SECTION = """\
## Writing tokens on a CPU with {kernel}

One text, one token at a time, greedily, with a static cache, {threads} threads; linears of the blocks dense or packed
at {bits:g} bits a weight with a trellis code. All else is in bfloat16, but for models in float32 and those whose
embedding and head are packed in 8 bits, which compute in float32, as `arbllm` does on a CPU. All models run the code of
transformers, *eager* as it is or *compiled* by `torch.compile`. Medians of {repeats} runs of {tokens} tokens in which
the contestants take turns; the spread is from the least to the greatest. Weights are random. Of LLaMA-7B one block and
four are measured, and a third of the difference is added for each of the other 28.

{machine}

{table}

llama.cpp, as `llama-cpp-python` builds it for this machine, in the same turns and with the same number of threads.
Weights of LLaMA-7B's shape are random there, too; SmolLM2's width is no multiple of 256, as Q2_K and TQ2_0 need.

{peers}

`{command}` writes this section.
"""

Step = Callable[[Tensor, Tensor], Tensor]
"""The next token, int64 (1, 1), after this one at this place, int64 (1)."""


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the kernel")
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--tokens", type=int, default=16, help="of a run")
    parser.add_argument("--repeats", type=int, default=4, help="runs")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # all models share the code of one step
    console = Console(width=120)
    rows: Rows = []
    peers: Rows = []
    for name in options.models:
        dense_and_packed, others = contest(name, options.bits, options.tokens, options.repeats, options.threads)
        rows += dense_and_packed
        peers += others
    console.print(as_table(HEADINGS, rows))
    console.print(as_table(PEER_HEADINGS, peers) if peers else NO_PEER)
    if options.page:
        kernel = cpu.instruction_sets()[0]
        text = _SECTION.format(
            threads=options.threads, bits=options.bits, repeats=options.repeats, tokens=options.tokens,
            kernel=kernel, machine=machine(), table=as_markdown(HEADINGS, rows),
            peers=as_markdown(PEER_HEADINGS, peers) if peers else NO_PEER, command=COMMAND,
        )  # fmt: skip
        write_section(PERFORMANCE, f"tokens on a CPU with {kernel}", text)
        console.print(f"wrote {PERFORMANCE}")


def contest(name: str, bits: float, tokens: int, repeats: int, threads: int) -> tuple[Rows, Rows]:
    """A model dense in two dtypes and packed in two ways, each eager and compiled; and what llama.cpp does."""
    blocks = MEASURED_BLOCKS[name]
    contestants: dict[tuple[str, int], Callable[[], float]] = {}
    for linears in (*DENSE, PACKED, PACKED_ALL):
        for count in blocks:
            model = make_model(name, count, linears, bits)
            for loop in LOOPS:
                contestants[f"{linears} {loop}", count] = partial(seconds_a_token, *decoder(model, loop), tokens)
    for kind, count, peer in peers_of(SHAPES[name], blocks, threads, writing):
        contestants[kind, count] = partial(peer, tokens)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in contestants}
    for repeat in range(repeats + 1):
        for key, contestant in contestants.items():
            found = contestant()
            if repeat:  # the first round compiles
                seconds[key].append(found)
    more = SHAPES[name]["num_hidden_layers"] - blocks[-1]
    whole = {
        kind: whole_model(seconds[kind, blocks[0]], seconds[kind, blocks[-1]], more, blocks)
        for kind in dict.fromkeys(kind for kind, _ in contestants)
    }
    return ranking(name, whole), peer_ranking(name, whole)


def whole_model(few: list[float], many: list[float], more: int, blocks: Sequence[int]) -> list[float]:
    """Seconds a token of all blocks, in rising order, from those of the measured numbers of blocks."""
    steps = max(1, blocks[-1] - blocks[0])
    return sorted(b + more * (b - a) / steps for a, b in zip(few, many, strict=True))


def ranking(name: str, whole: dict[str, list[float]]) -> Rows:
    """The models that run here, each beside the dense ones of the same loop."""
    rows: Rows = []
    for loop in LOOPS:
        for linears in (*DENSE, PACKED, PACKED_ALL):
            found = whole[f"{linears} {loop}"]
            ratios = (median(whole[f"{dense} {loop}"]) / median(found) for dense in DENSE)
            rows.append((name, linears, loop, *speeds(found), *(f"{ratio:.2f}" for ratio in ratios)))
    return rows


def peer_ranking(name: str, whole: dict[str, list[float]]) -> Rows:
    """What llama.cpp does, and how many times as fast the faster of the packed models is."""
    packed = min(median(whole[f"{linears} {loop}"]) for linears in (PACKED, PACKED_ALL) for loop in LOOPS)
    peers = {kind: found for kind, found in whole.items() if kind.startswith(PEER)}
    return [(name, kind, *speeds(found), f"{median(found) / packed:.2f}") for kind, found in peers.items()]


def speeds(seconds: list[float]) -> tuple[str, str]:
    """The median and the spread of tokens a second."""
    return f"{1 / median(seconds):.2f}", f"{1 / seconds[-1]:.2f}-{1 / seconds[0]:.2f}"


def make_model(name: str, blocks: int, linears: str, bits: float) -> LlamaForCausalLM:
    """A model with random weights; what is not packed is in bfloat16, or in float32 beside embeddings in 8 bits."""
    dtype = torch.float32 if linears in ("float32", PACKED_ALL) else torch.bfloat16
    config = LlamaConfig(**{**SHAPES[name], "num_hidden_layers": blocks}, max_position_embeddings=2048)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if linears in (PACKED, PACKED_ALL):
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
    if linears == PACKED_ALL:
        quantize_embeddings(model, ROW_BITS)
    return model.eval()


def decoder(model: LlamaForCausalLM, loop: str) -> tuple[Step, StaticCache]:
    """A model's step and the cache that it fills."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=CACHE_LENGTH)
    width = config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, width, model.dtype, model.device)

    def step(token: Tensor, place: Tensor) -> Tensor:
        logits = model(token, past_key_values=cache, cache_position=place, use_cache=True).logits
        return logits[:, -1:].argmax(-1)

    return (torch.compile(step, dynamic=False) if loop == "compiled" else step), cache


@torch.inference_mode()
def seconds_a_token(step: Step, cache: StaticCache, tokens: int) -> float:
    """Seconds of a token, after a few that do not count."""
    cache.reset()
    token = torch.ones(1, 1, dtype=torch.int64)
    start = 0.0
    for position in range(WARM_UP + tokens):
        if position == WARM_UP:
            start = time.perf_counter()
        token = step(token, torch.tensor([position]))
    return (time.perf_counter() - start) / tokens


if __name__ == "__main__":
    main()
