"""Packed products on a GPU against torch's bfloat16 ones: time, ratio, and share of what the memory's bandwidth allows.

    python benchmarks/gpu_kernels.py [--bits 2.25] [--repeats 7] [--page]

Each time is that of one product in a CUDA graph that goes through as many matrices as the GPU's cache cannot hold.
Without a GPU it says so, and leaves the page as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import triton
from rich.console import Console
from torch import Tensor
from torch.nn.functional import linear

from arbllm.format.rows import quantize_rows
from arbllm.kernels import rows as byte_rows
from arbllm.kernels.cuda import multiply, prepare
from random_matrices import random_matrix
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

SHAPES = ((4096, 4096), (4096, 11_008), (8192, 28_672))
BATCHES = (1, 8, 16, 64, 2048)
PLAIN_BATCHES = (1, 8)
"""Tokens times matrices of the same bits without a trellis."""
HEADS = ((32_000, 4096), (128_256, 4096))
HEAD_BATCHES = (1, 8, 16)
HEADINGS = ("matrix", "tokens", "bfloat16, us", "packed, us", "spread, us", "ratio", "share of bandwidth")
CACHE_BYTES = 300 * 10**6
"""Memory that products go through before they come back to the first: several times the cache of any GPU."""
COPY_BYTES = 2 * 10**9
COMMAND = "python benchmarks/gpu_kernels.py --page"

_SECTION = """\
## Products on a GPU

One product y = x Wᵀ, inputs in bfloat16, W packed at {bits:g} bits a weight, or an output head in 8-bit rows, against
the same in bfloat16 (cuBLAS).
Medians of {repeats} runs, each a CUDA graph through matrices of {cache} MB together, so that none comes from the cache.
*Ratio* is how many times as fast the packed product is; *share of bandwidth* is the time that reading the packed bytes
takes at {bandwidth}, over the time of the product.

{machine}

{table}

`{command}` writes this section.
"""


class Times(NamedTuple):
    """Seconds of one product: median, least and greatest of the repeats."""

    middle: float
    least: float
    most: float


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--repeats", type=int, default=7, help="the median of so many runs is shown")
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here, so nothing is measured.")
    console = Console(width=150)
    rows: Rows = []
    speed = copy_speed(options.repeats)
    for shape in SHAPES:
        rows += products(shape, options.bits, options.repeats, speed)
        rows += products(shape, options.bits, options.repeats, speed, trellis=False)
    for shape in HEADS:
        rows += head_products(shape, options.repeats, speed)
    console.print(as_table(HEADINGS, rows))
    if options.page:
        text = _SECTION.format(
            bits=options.bits,
            repeats=options.repeats,
            cache=CACHE_BYTES // 10**6,
            bandwidth=f"the {speed / 1e9:.0f} GB/s of a streaming copy (read and written bytes together)",
            machine=machine(),
            table=as_markdown(HEADINGS, rows),
            command=COMMAND,
        )
        write_section(PERFORMANCE, "products on a GPU", text)
        console.print(f"wrote {PERFORMANCE}")


def machine() -> str:
    """The GPU and the versions."""
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}"
    return f"{torch.cuda.get_device_name()}, {versions}."


def products(shape: tuple[int, int], bits: float, repeats: int, speed: float, *, trellis: bool = True) -> Rows:
    """All batches of one shape."""
    device = torch.device("cuda")
    first = random_matrix(*shape, bits, device, trellis)
    packed = [first] + [random_matrix(*shape, bits, device, trellis) for _ in range(CACHE_BYTES // first.nbytes)]
    dense, ready = _dense(shape), [prepare(matrix) for matrix in packed]
    table: Rows = []
    label = f"{shape[0]} x {shape[1]}" + ("" if trellis else ", no trellis")
    for tokens in BATCHES if trellis else PLAIN_BATCHES:
        x = _inputs(tokens, shape[1])
        ours = graph_times([partial(multiply, x, one, shape[0]) for one in ready], repeats)
        theirs = graph_times([partial(linear, x, weight) for weight in dense], repeats)
        table.append(_row(label, tokens, ours, theirs, first.nbytes / speed))
    return table


def head_products(shape: tuple[int, int], repeats: int, speed: float) -> Rows:
    """A few tokens times an output head in 8-bit rows."""
    dense = _dense(shape)
    codes, scales = quantize_rows(dense[0])
    copies = [codes.clone() for _ in range(1 + CACHE_BYTES // codes.nbytes)]
    table: Rows = []
    for tokens in HEAD_BATCHES:
        x = _inputs(tokens, shape[1])
        ours = graph_times([partial(byte_rows.multiply, x, copy, scales) for copy in copies], repeats)
        theirs = graph_times([partial(linear, x, weight) for weight in dense], repeats)
        label = f"{shape[0]} x {shape[1]}, 8-bit rows"
        table.append(_row(label, tokens, ours, theirs, (codes.nbytes + scales.nbytes) / speed))
    return table


def _dense(shape: tuple[int, int]) -> list[Tensor]:
    count = 1 + CACHE_BYTES // (2 * shape[0] * shape[1])
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(count)]


def _inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")


def _row(label: str, tokens: int, ours: Times, theirs: Times, at_best: float) -> tuple[str, ...]:
    times = (f"{1e6 * theirs.middle:.1f}", f"{1e6 * ours.middle:.1f}", f"{1e6 * ours.least:.1f}-{1e6 * ours.most:.1f}")
    return (label, str(tokens), *times, f"{theirs.middle / ours.middle:.2f}", f"{at_best / ours.middle:.0%}")


def graph_times(calls: list[Callable[[], Tensor]], repeats: int) -> Times:
    """Seconds of one call, where all are made one after the other in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = sorted(event_seconds(graph.replay) / len(calls) for _ in range(repeats))
    return Times(median(seconds), seconds[0], seconds[-1])


def event_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call on the GPU."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(stop)


def copy_speed(repeats: int) -> float:
    """Bytes that a streaming copy reads and writes in a second."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * COPY_BYTES / median(event_seconds(lambda: target.copy_(source)) for _ in range(repeats))


if __name__ == "__main__":
    main()
