"""Tokens of a prompt that a CPU reads in a second: packed against bfloat16 and float32, beside llama.cpp.

    python benchmarks/prompts.py [--threads 2] [--bits 2.25] [--lengths 32 128 512] [--repeats 4] [--page]

The models of `decode.py`, as they are: weights are random, and of the LLaMA-7B as many blocks are measured as tell what
a block costs. Logits are computed for the last token alone, as before text is written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from arbllm.device import float32_precision
from arbllm.kernels import cpu
from decode import DENSE, MEASURED_BLOCKS, PACKED, PACKED_ALL, SHAPES, make_model, whole_model
from kernels import machine
from llama_cpp_peer import NO_PEER, PEER, Timer, peers_of, reading
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

HEADINGS = ("model", "linears", "tokens of the prompt", "tokens a second", "spread", "x bfloat16", "x float32")
MEDIUM = f"{PACKED_ALL}, medium"
COMMAND = "python benchmarks/prompts.py --page"

_SECTION = """\
## Reading prompts on a CPU with {kernel}

One text, all its tokens at once, {threads} threads; the models are those of the section above, uncompiled, and logits
are computed for the last token alone. *Medium* is under `torch.set_float32_matmul_precision("medium")`, so that
products in float32 of many tokens are rounded to bfloat16 as well. Medians of {repeats} runs in which the contestants
take turns; the spread is from the least to the greatest.

{machine}

{table}

{peers}

`{command}` writes this section.
"""


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the kernel")
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--lengths", type=int, nargs="+", default=(32, 128, 512), help="tokens of the prompts")
    parser.add_argument("--repeats", type=int, default=4, help="runs")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    rows: Rows = []
    for name in options.models:
        rows += contest(name, options.bits, options.lengths, options.repeats, options.threads)
    has_peer = any(PEER in linears for _, linears, *_ in rows)
    peers = "llama.cpp as in the section above." if has_peer else NO_PEER
    console.print(as_table(HEADINGS, rows))
    console.print(peers)
    if options.page:
        kernel = cpu.instruction_sets()[0]
        text = _SECTION.format(
            threads=options.threads, repeats=options.repeats, kernel=kernel, machine=machine(),
            table=as_markdown(HEADINGS, rows), peers=peers, command=COMMAND,
        )  # fmt: skip
        write_section(PERFORMANCE, f"prompts on a CPU with {kernel}", text)
        console.print(f"wrote {PERFORMANCE}")


def contest(name: str, bits: float, lengths: Sequence[int], repeats: int, threads: int) -> Rows:
    """A model dense in two dtypes, packed in two ways, one of them with less precision; and what llama.cpp does."""
    blocks = MEASURED_BLOCKS[name]
    readers: dict[tuple[str, int], Timer] = {}
    for count in blocks:
        models = {linears: make_model(name, count, linears, bits) for linears in (*DENSE, PACKED, PACKED_ALL)}
        for linears, model in models.items():
            readers[linears, count] = partial(seconds, model, "highest")
        readers[MEDIUM, count] = partial(seconds, models[PACKED_ALL], "medium")
    for kind, count, peer in peers_of(SHAPES[name], blocks, threads, reading):
        readers[kind, count] = peer
    more = SHAPES[name]["num_hidden_layers"] - blocks[-1]
    kinds = list(dict.fromkeys(kind for kind, _ in readers))
    rows: Rows = []
    for length in lengths:
        found: dict[tuple[str, int], list[float]] = {key: [] for key in readers}
        for repeat in range(repeats + 1):
            for key, read in readers.items():
                taken = read(length)
                if repeat:  # the first round prepares weights
                    found[key].append(taken)
        whole = {kind: whole_model(found[kind, blocks[0]], found[kind, blocks[-1]], more, blocks) for kind in kinds}
        for kind in kinds:
            middle, ratios = median(whole[kind]), (median(whole[dense]) / median(whole[kind]) for dense in DENSE)
            spread = f"{length / whole[kind][-1]:.1f}-{length / whole[kind][0]:.1f}"
            rows.append((name, kind, str(length), f"{length / middle:.1f}", spread, *(f"{r:.2f}" for r in ratios)))
    return rows


@torch.inference_mode()
def seconds(model: LlamaForCausalLM, precision: str, length: int) -> float:
    """Seconds that a model takes to read a prompt."""
    with float32_precision(precision):
        start = time.perf_counter()
        model(torch.ones(1, length, dtype=torch.int64), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
