"""Packed products on a CPU against torch's dense ones: time, ratio, share of the memory's bandwidth, error.

    python benchmarks/kernels.py [--threads 2] [--bits 2.25] [--repeats 9] [--page]

Each instruction set has a section of its own on the page: that of the machine which this runs on is written.

The contestants take turns, so that whatever else the machine does falls on all of them. A call that counts follows one
of its own kind that does not, as products of one kind follow each other in a model. All go through as many matrices as
the cache cannot hold. The bandwidth limit is the time of a streaming sum over the packed bytes.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import linear

from arbllm.format.rows import quantize_rows
from arbllm.kernels import cpu, reference
from arbllm.kernels import rows as byte_rows
from random_matrices import random_matrix
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

SHAPES = ((4096, 11_008), (4096, 4096))
HEAD = (49_152, 576)
BATCHES = (1, 2, 4, 8, 16, 64, 128, 512)
CACHE_BYTES = 100 * 10**6
"""Packed matrices that products go through before they come back to the first: three times a large cache."""
MANY = 512
"""Tokens from which on a product is timed an eighth as often."""
HEADINGS = (
    "matrix", "columns", "tokens", "bfloat16, ms", "float32, ms", "packed, ms", "spread, ms", "x bfloat16", "x float32",
    "share of bandwidth", "x bfloat16 at best", "share at best", "error",
)  # fmt: skip
COMMAND = "python benchmarks/kernels.py --page"

_SECTION = """\
## Products on a CPU with {kernel}

One product y = x Wᵀ, {threads} threads, W packed at {bits:g} bits a weight, with a trellis code or, as `--no-trellis`
has it, with groups, against `torch.nn.functional.linear` in bfloat16 and float32. Medians of {repeats} runs in which
the contestants take turns; the spread is that of the middle half of the packed runs. *At best* compares the least times
instead, which other jobs on the machine disturb less. Each run follows one of its own kind that does not count, as
products of one kind follow each other in a model, and all go through matrices of {cache} MB together, so that no weight
comes from the cache. *Share of bandwidth* is the time of a streaming sum over the bytes of the packed tensors, with as
many threads, over that of the product. *Error* is that of the output, inputs being normally distributed in bfloat16 and
outputs rounded to it. Up to {most} tokens{groups} are multiplied from tables or activations of 8
bits, more in {many}.

{machine}

{table}

A call of `BinaryLinear` that computes next to nothing (64 x 64, one token) takes {overhead:.1f} us, Python and operator
included, of which the product is {product:.1f} us.

The output head of SmolLM2-135M, {head}, one token, from memory as above: {head_times}.

`{command}` writes this section.
"""


class Times(NamedTuple):
    """Seconds: the least, the median, and the bounds of the middle half."""

    least: float
    middle: float
    low: float
    high: float


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the kernel")
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="tokens of a product")
    parser.add_argument("--repeats", type=int, default=25, help="the median of so many runs is shown")
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=180)
    rows: Rows = []
    for trellis in (True, False):
        for shape in SHAPES:
            rows += products(shape, options.batches, options.bits, options.repeats, trellis)
    console.print(as_table(HEADINGS, rows))
    overhead, product = overheads()
    console.print(f"a small call: {overhead:.1f} us, its product {product:.1f} us")
    heads = ", ".join(f"{name} {1e3 * times.middle:.2f} ms" for name, times in head_products(options.repeats).items())
    console.print(f"a head: {heads}")
    if options.page:
        kernel, native = cpu.instruction_sets()[0], cpu.native_module()
        many = "bfloat16, for which this processor has instructions" if native.MULTIPLIES_BFLOAT16 else "float32"
        groups = ", fewer of columns with groups," if cpu.takes_more() else ""
        text = _SECTION.format(
            threads=options.threads, bits=options.bits, repeats=options.repeats, cache=CACHE_BYTES // 10**6,
            most=cpu.most_tokens(), groups=groups, many=many, kernel=kernel, machine=machine(),
            table=as_markdown(HEADINGS, rows), overhead=overhead, product=product,
            head=" x ".join(map(str, HEAD)), head_times=heads, command=COMMAND,
        )  # fmt: skip
        write_section(PERFORMANCE, f"products on a CPU with {kernel}", text)
        console.print(f"wrote {PERFORMANCE}")


def machine() -> str:
    """The processor, its instruction set and the versions."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
    return f"{name}; kernel {', '.join(cpu.instruction_sets()[:1])}; PyTorch {torch.__version__}."


def products(shape: tuple[int, int], batches: Sequence[int], bits: float, repeats: int, trellis: bool) -> Rows:
    """All batches of one shape."""
    rows, columns = shape
    matrix = random_matrix(rows, columns, bits, torch.device("cpu"), trellis)
    prepared = cpu.prepare(matrix)
    weight = matrix.dequantize()
    copies = cycle([prepared] + [cpu.prepare(matrix) for _ in range(CACHE_BYTES // prepared.numel())])
    singles, halves = (
        cycle([dense.clone() for _ in range(1 + CACHE_BYTES // dense.nbytes)]) for dense in (weight, weight.bfloat16())
    )
    streams = cycle(
        [torch.ones(matrix.nbytes // 8, dtype=torch.int64) for _ in range(1 + CACHE_BYTES // matrix.nbytes)]
    )
    table: Rows = []
    for tokens in batches:
        x = torch.randn(tokens, columns)
        xs = x.bfloat16()
        contestants: list[Callable[[], Tensor]] = [
            partial(_dense, xs, halves),
            partial(_dense, x, singles),
            partial(_packed, xs, copies, rows),
            partial(_stream, streams),
        ]
        dense, single, packed, stream = in_turn(contestants, repeats if tokens < MANY else max(3, repeats // 8))
        expected = reference.matmul(xs.float(), matrix)
        error = (cpu.multiply(xs, prepared, rows) - expected).norm() / expected.norm()
        table.append(
            (
                f"{rows} x {columns}", "trellis" if trellis else "groups", str(tokens),
                *(f"{1e3 * times.middle:.2f}" for times in (dense, single, packed)),
                f"{1e3 * packed.low:.2f}-{1e3 * packed.high:.2f}", f"{dense.middle / packed.middle:.2f}",
                f"{single.middle / packed.middle:.2f}", f"{stream.middle / packed.middle:.0%}",
                f"{dense.least / packed.least:.2f}", f"{stream.least / packed.least:.0%}", f"{error:.2%}",
            )
        )  # fmt: skip
    return table


def head_products(repeats: int) -> dict[str, Times]:
    """An output head times one token, in 8-bit rows and dense."""
    x, weight = torch.randn(1, HEAD[1]), torch.randn(HEAD)
    codes, scales = quantize_rows(weight)
    copies = cycle([codes.clone() for _ in range(1 + CACHE_BYTES // codes.nbytes)])
    singles, halves = (cycle([dense, dense.clone()]) for dense in (weight, weight.bfloat16()))
    contestants: dict[str, Callable[[], Tensor]] = {
        "8-bit rows": lambda: byte_rows.multiply(x, next(copies), scales),
        "bfloat16": partial(_dense, x.bfloat16(), halves),
        "float32": partial(_dense, x, singles),
    }
    return dict(zip(contestants, in_turn(list(contestants.values()), repeats), strict=True))


def _dense(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return linear(x, next(weights))


def _packed(x: Tensor, copies: Iterator[Tensor], rows: int) -> Tensor:
    return cpu.multiply(x, next(copies), rows)


def _stream(streams: Iterator[Tensor]) -> Tensor:
    return next(streams).sum()


def in_turn(calls: list[Callable[[], Tensor]], repeats: int) -> list[Times]:
    """The times of all calls, made in turns, each after one of its own that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, seconds, strict=True):
            call()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    ordered = [sorted(found) for found in seconds]
    return [Times(found[0], median(found), found[repeats // 4], found[repeats - 1 - repeats // 4]) for found in ordered]


def overheads(calls: int = 50, loops: int = 200) -> tuple[float, float]:
    """Microseconds of a small layer's call, and of its product alone: the best of some loops."""
    from arbllm.nn import BinaryLinear

    matrix = random_matrix(64, 64, 4.0, torch.device("cpu"))
    layer, x = BinaryLinear.from_matrix(matrix), torch.randn(1, 64)
    prepared, y, module = cpu.prepare(matrix), torch.empty(1, 64), cpu.native()
    assert module
    addresses, sizes = (prepared.data_ptr(), x.data_ptr(), y.data_ptr()), (1, 64, 64, 64)

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    with torch.inference_mode():
        whole = min(seconds(lambda: layer(x)) for _ in range(loops))
        product = min(seconds(lambda: module.multiply(*addresses, *sizes, False, True, 0, 1)) for _ in range(loops))
    return 1e6 * whole, 1e6 * product


if __name__ == "__main__":
    main()
