"""Tokens a second of a LLaMA-7B with random weights on a GPU, packed against bfloat16, one text, CUDA graphs.

    python benchmarks/gpu_decode.py [--bits 2.25] [--tokens 256] [--repeats 5] [--page]
    python benchmarks/gpu_decode.py --device cpu --blocks 1 --width 256 --inner 384   # whether it runs, no figures

Without a GPU it says so, and leaves the page as it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn

from arbllm.format.published import LLAMA_7B, ModelShape
from arbllm.nn import BinaryLinear
from gpu_kernels import machine
from llama_shape import Decoder, MakeLinear
from random_matrices import random_matrix
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

HEADINGS = ("linears", "GB of linears", "tokens a second", "spread", "ratio")
COMMAND = "python benchmarks/gpu_decode.py --page"

_SECTION = """\
## Writing tokens on a GPU

A LLaMA-7B with random weights, one text of {tokens} tokens, one token at a time in a CUDA graph with a static cache.
Both models run the same code but for the linears of their blocks, which are packed at {bits:g} bits a weight. Medians
of {repeats} runs.

{machine}

{table}

`{command}` writes this section.
"""


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many runs is shown")
    parser.add_argument("--device", default="cuda", help="cpu only shows that the code runs")
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    for name in ("blocks", "width", "inner"):
        parser.add_argument(f"--{name}", type=int, default=getattr(LLAMA_7B, name), help="of the model")
    options = parser.parse_args()
    shape = replace(LLAMA_7B, blocks=options.blocks, width=options.width, inner=options.inner)
    if options.page and (options.device != "cuda" or shape != LLAMA_7B):
        parser.error("--page is for the whole model on a GPU")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here, so nothing is measured.")
    console = Console(width=150)
    rows = decode(shape, options.bits, options.tokens, options.repeats, options.device)
    console.print(as_table(HEADINGS, rows))
    if options.page:
        text = _SECTION.format(
            tokens=options.tokens,
            bits=options.bits,
            repeats=options.repeats,
            machine=machine(),
            table=as_markdown(HEADINGS, rows),
            command=COMMAND,
        )
        write_section(PERFORMANCE, "tokens on a GPU", text)
        console.print(f"wrote {PERFORMANCE}")


def decode(shape: ModelShape, bits: float, tokens: int, repeats: int, device: str) -> Rows:
    """Both models, one after the other."""
    rows: Rows = []
    first = 0.0
    for name, linear in (("bfloat16", partial(dense, device=device)), ("packed", partial(packed, bits, device=device))):
        speeds, size = run(shape, linear, tokens, repeats, device)
        middle = median(speeds)
        first = first or middle
        spread = f"{min(speeds):.1f}-{max(speeds):.1f}"
        rows.append((name, f"{size / 1e9:.2f}", f"{middle:.1f}", spread, f"{middle / first:.2f}"))
    return rows


def dense(rows: int, columns: int, device: str) -> nn.Module:
    """A linear layer in bfloat16."""
    return nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=device)


def packed(bits: float, rows: int, columns: int, device: str) -> nn.Module:
    """A packed linear layer."""
    return BinaryLinear.from_matrix(random_matrix(rows, columns, bits, torch.device(device)))


@torch.no_grad()
def run(shape: ModelShape, linear: MakeLinear, tokens: int, repeats: int, device: str) -> tuple[list[float], int]:
    """Tokens a second of each run, and bytes of the linears of all blocks."""
    model = Decoder(shape, tokens + 1, linear, torch.bfloat16, device)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    step = graph_of(model, token) if device == "cuda" else partial(advance, model, token)
    speeds = []
    for _ in range(repeats):
        model.position.zero_()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(tokens):
            step()
        synchronize(device)
        speeds.append(tokens / (time.perf_counter() - start))
    linears = [module for module in model.blocks.modules() if isinstance(module, (nn.Linear, BinaryLinear))]
    return speeds, sum(tensor.nbytes for module in linears for tensor in (*module.parameters(), *module.buffers()))


def advance(model: Decoder, token: Tensor) -> None:
    """Write one token."""
    token.copy_(model(token))


def graph_of(model: Decoder, token: Tensor) -> Callable[[], None]:
    """`advance` as a CUDA graph: call it to write one token."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        advance(model, token)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(model, token)
    return graph.replay


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
