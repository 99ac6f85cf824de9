"""Storage as the paper counts it and as it is, and what lossless codings of the group bitmap save.

    python benchmarks/storage.py [--data ../shared/data] [--repeats 3] [--page]

Single-threaded. The matrices and their Hessians are read from DATA/reference. With --page, writes docs/storage.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log2
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from arbllm.budget import joint_layout
from arbllm.config import BinarizationConfig
from arbllm.format.accounting import StorageSize, matrix_size, total_size
from arbllm.format.bitplanes import pack, unpack
from arbllm.format.coding import decode, encode
from arbllm.format.layout import Layout
from arbllm.format.published import (
    GIGABYTES,
    LLAMA_7B,
    LLAMA_13B,
    SALIENT_SHARE,
    ModelShape,
    half_precision_bytes,
    published_bytes,
    published_layout,
)
from arbllm.format.rows import RowLayout
from arbllm.solver import quantize_matrix
from solver import DATA, ROOT, Rows, as_markdown, as_table

PAGE = ROOT / "docs" / "storage.md"
SHAPES = (LLAMA_7B, LLAMA_13B)
BUDGETS = (1.6, 2.25, 2.85)
SHARES = (0.05, 0.107, 0.2, 0.3, 0.35, 0.5)
RANDOM_ROWS, RANDOM_COLUMNS = 1024, 4096
REFERENCE_CASE = "arb-rc + CGB, paper's thresholds"
CASES = {
    "arb-rc + CGB": BinarizationConfig(method="arb-rc"),
    REFERENCE_CASE: BinarizationConfig(method="arb-rc", split_on="saliency", compensation="reference"),
    "arb-rcx 2.25, no trellis": BinarizationConfig(method="arb-rcx", bits=2.25, trellis=False),
}

PUBLISHED_HEADINGS = ("method", "counting", "7B, paper", "7B, formula", "13B, paper", "13B, formula")
STORED_HEADINGS = (
    *("method", "nominal bits", "true bits", "7B, paper", "7B", "7B, linears", "7B, 8-bit embeddings"),
    *("13B, paper", "13B", "13B, linears", "13B, 8-bit embeddings"),
)
CODING_HEADINGS = (
    *("share of ones", "raw", 'paper\'s "CSR"', "H(p)", "entropy", "csr", "decoding, ns a weight"),
    *("7B raw, GB", 'paper\'s "CSR", GB', "entropy, GB", "csr, GB"),
)
MEASURED_HEADINGS = (
    *("matrix", "method", "share of ones", "H(p)", "entropy", "csr"),
    *("true bits, raw", "true bits, entropy", "true bits, csr"),
)

_PAGE = """\
# Storage, as published and as it is

## The paper's table

The paper gives the memory of LLaMA-7B and 13B. Its figures follow from the shapes of the models, with {salient:.0%} of
the columns salient, blocks of 128, and embeddings, head and norms in 16 bits: the formulas, in
`src/arbllm/format/published.py`, give each of them to the last digit. GB are 10^9 bytes; with 2^30 they do not fit
(ARB-RC with CGB on LLaMA-7B would take {binary:.2f}). In 16 bits the models take {half[0]:.2f} and {half[1]:.2f} GB.

{published}

## The same, stored

GB of the tensors that arbllm writes for the same shapes, with raw bitmaps and each row padded to whole bytes.
`arb-rcx` has the layout that a uniform budget gives it. Beside the whole model stand its linears alone, and the whole
model with embeddings and head in 8 bits. Headers come on top, some 200 bytes a tensor.

{stored}

The paper's raw figures are true to what must be stored. They leave out the padding, which is nothing at such widths.
They count one thing too much: without CGB the salient columns have a single group, and need no group numbers. These
are {salient:.2f} bits a weight, {needless:.2f} GB of the 7B model, and arbllm does not store them.

*Nominal* bits, {nominal:.2f} here, count signs alone. Of the {true:.2f} true bits of ARB-RC with CGB the group bitmap
is {bitmap:.2f}, and row scales are {row_scales:.2f}; `arb-rcx` has fewer and shorter ones.

## "CSR"

Under this name the paper counts n c bits for the group bitmap in place of n m: {salient:.2f} bits a weight, not 1.
No lossless code is that short. A bitmap with a share p of ones takes H(p) = - p log2 p - (1 - p) log2 (1 - p) bits a
weight at least, unless its ones follow a pattern, and that is {salient:.2f} only where {sparse:.1%} of the weights are
ones. n c bits hold the group numbers of the salient columns alone, and those of all other columns nowhere.

Compressed sparse rows, as the name is otherwise used, list the column of each one: 16 p bits a weight, and a pointer to
each row. That is less than the raw bit only where p is below 1/16.

A random bitmap of {rows} x {columns}, in bits a weight with all headers, and LLaMA-7B by ARB-RC with CGB if its
bitmaps were like it:

{codings}

## `--bitmap` on real matrices

`arbllm quantize --bitmap raw|csr|entropy` chooses how the files hold the group bitmap, where there is one: with a
trellis code, the default of `arb-rcx`, there are no groups. `csr` lists the rarer of the two symbols. `entropy` is a
range coder ([constriction](https://bamler-lab.github.io/constriction/)) with one share of ones for the matrix, or one
for each row where that gains more than it costs. Both are decoded when the model is loaded: in memory the bitmap is
raw. A model that was loaded is saved in the same way again.

On three linear layers of SmolLM2-135M, in bits a weight of the bitmap, and in true bits of the whole matrix:

{measured}

- Where groups are chosen for the least error of the weights, {low:.0%} to {high:.0%} are ones, and `entropy` saves
  {least:.2f} to {most:.2f} bits a weight. The thresholds of the paper's own code split off about a tenth. That leaves a
  bitmap of which half is redundant, and a larger error at the same raw bits ([fidelity](fidelity.md)).
- `entropy` takes at most {overhead:.3f} bits a weight more than H(p), and less than H(p) where rows differ in their
  shares, as they do with `arb-rc`. So what it attains is near all that there is, short of a model of the weights.
- `csr` is larger than raw on every matrix. It is there to compare with.
- Decoding takes {seconds:.0f} s of processor time for all the bitmaps of a LLaMA-7B at such shares, once at load.

`--bits` and `--size` count the raw bitmap, as memory holds it; with `entropy` the files come out smaller than asked
for. `arbllm inspect` shows both.

`python benchmarks/storage.py --page` writes this page.
"""


@dataclass(frozen=True)
class CodedBitmap:
    """A group bitmap under each coding.

    Attributes:
        weights: its bits.
        share: of ones.
        nbytes: of the coded bitmap by coding.
        decoding: processor seconds that `entropy` takes to decode, the least of several runs.
    """

    weights: int
    share: float
    nbytes: dict[str, int]
    decoding: float

    @property
    def entropy(self) -> float:
        """H(p)."""
        return entropy(self.share)

    def bits(self, coding: str) -> float:
        """Bits a weight."""
        return 8 * self.nbytes[coding] / self.weights


@dataclass(frozen=True)
class QuantizedMatrix:
    """One row of the last table."""

    matrix: str
    case: str
    layout: Layout
    bitmap: CodedBitmap

    def true_bits(self, coding: str | None = None) -> float:
        """Of the whole matrix, with its bitmap raw or coded."""
        coded = {"group_bitmap": self.bitmap.nbytes[coding]} if coding else None
        return matrix_size(self.layout, coded).true_bits


def main() -> None:
    """Print the tables, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds reference/")
    parser.add_argument("--repeats", type=int, default=3, help="the least time of so many runs is shown")
    parser.add_argument("--page", action="store_true", help="also write docs/storage.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bitmaps = [random_bitmap(share, options.repeats) for share in SHARES]
    matrices = quantized(options.data / "reference", options.repeats)
    tables = {
        "published": (PUBLISHED_HEADINGS, published_rows()),
        "stored": (STORED_HEADINGS, stored_rows()),
        "codings": (CODING_HEADINGS, [coding_row(bitmap) for bitmap in bitmaps]),
        "measured": (MEASURED_HEADINGS, [measured_row(matrix) for matrix in matrices]),
    }
    console = Console(width=180)
    for headings, rows in tables.values():
        console.print(as_table(headings, rows))
    if options.page:
        texts = {name: as_markdown(headings, rows) for name, (headings, rows) in tables.items()}
        PAGE.write_text(_PAGE.format(**texts, **facts(bitmaps, matrices)))
        console.print(f"wrote {PAGE}")


def published_rows() -> Rows:
    """The paper's memory table, and the formulas."""
    rows: Rows = []
    for (method, cgb), figures in GIGABYTES.items():
        for csr, paper in enumerate(figures):
            ours = [published_bytes(method, shape, cgb=cgb, csr=bool(csr)) / 1e9 for shape in SHAPES]
            cells = [f"{cell:.2f}" for pair in zip(paper, ours, strict=True) for cell in pair]
            rows.append((named(method, cgb), '"CSR"' if csr else "raw", *cells))
    return rows


def stored_rows() -> Rows:
    """What our layouts of the same shapes store, and those of arb-rcx."""
    rows = []
    for (method, cgb), (raw, _) in GIGABYTES.items():
        sizes = [published_size(method, cgb, shape) for shape in SHAPES]
        rows.append(stored_row(named(method, cgb), sizes, [f"{figure:.2f}" for figure in raw]))
    for bits in BUDGETS:
        layout = partial(joint_layout, bits=bits, scale_block=BinarizationConfig().scale_block)
        sizes = [model_linears(shape, layout) for shape in SHAPES]
        rows.append(stored_row(f"arb-rcx {bits}", sizes, ["", ""]))
    return rows


def stored_row(label: str, sizes: Sequence[StorageSize], paper: Sequence[str]) -> tuple[str, ...]:
    """One method: `sizes` of the linears and `paper`'s figure for each of `SHAPES`."""
    cells = []
    for shape, size, figure in zip(SHAPES, sizes, paper, strict=True):
        totals = (size.nbytes + shape.dense_bytes, size.nbytes, size.nbytes + rounded_bytes(shape))
        cells += [figure, *(f"{total / 1e9:.2f}" for total in totals)]
    return (label, f"{sizes[0].nominal_bits:.2f}", f"{sizes[0].true_bits:.2f}", *cells)


def coding_row(bitmap: CodedBitmap) -> tuple[str, ...]:
    """A random bitmap, and LLaMA-7B with such bitmaps."""
    bits = (1.0, SALIENT_SHARE, bitmap.entropy, bitmap.bits("entropy"), bitmap.bits("csr"))
    raw = published_bytes("arb-rc", LLAMA_7B, cgb=True)
    sizes = [raw + (bits[place] - 1) * LLAMA_7B.linear_weights / 8 for place in (0, 1, 3, 4)]
    time = f"{1e9 * bitmap.decoding / bitmap.weights:.0f}"
    return (f"{bitmap.share:.3f}", *(f"{b:.3f}" for b in bits), time, *(f"{size / 1e9:.2f}" for size in sizes))


def measured_row(matrix: QuantizedMatrix) -> tuple[str, ...]:
    """A real bitmap, and its matrix."""
    bitmap = matrix.bitmap
    bits = (bitmap.share, bitmap.entropy, bitmap.bits("entropy"), bitmap.bits("csr"))
    totals = (matrix.true_bits(), matrix.true_bits("entropy"), matrix.true_bits("csr"))
    return (matrix.matrix, matrix.case, *(f"{value:.3f}" for value in (*bits, *totals)))


def random_bitmap(share: float, repeats: int) -> CodedBitmap:
    """Independent bits."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(RANDOM_ROWS, RANDOM_COLUMNS, generator=generator) < share
    return coded_bitmap(pack(bits), RANDOM_COLUMNS, repeats)


def quantized(folder: Path, repeats: int) -> list[QuantizedMatrix]:
    """Each real matrix by each of `CASES`."""
    tensors = load_file(folder / "reference.safetensors")
    found = []
    for name in (key.removesuffix(".weight") for key in tensors if key.endswith(".weight")):
        for case, config in CASES.items():
            matrix = quantize_matrix(tensors[f"{name}.weight"], tensors[f"{name}.hessian"], config)
            assert matrix.group_bitmap is not None
            bitmap = coded_bitmap(matrix.group_bitmap, matrix.layout.grouped_columns, repeats)
            found.append(QuantizedMatrix(name.removeprefix("layers.4."), case, matrix.layout, bitmap))
    return found


def coded_bitmap(plane: Tensor, width: int, repeats: int) -> CodedBitmap:
    """A plane of bits under each coding."""
    coded = {coding: encode(plane, width, coding) for coding in ("csr", "entropy")}
    seconds = []
    for _ in range(repeats):
        start = time.process_time()  # the wall clock would tell how busy the machine is
        decoded = decode(coded["entropy"], len(plane), width, "entropy")
        seconds.append(time.process_time() - start)
        assert torch.equal(decoded, plane)
    bits = unpack(plane, width)
    sizes = {name: octets.numel() for name, octets in coded.items()}
    return CodedBitmap(bits.numel(), float(bits.double().mean()), sizes, min(seconds))


def facts(bitmaps: Sequence[CodedBitmap], matrices: Sequence[QuantizedMatrix]) -> dict[str, Any]:
    """The figures in the page's text."""
    ours = [matrix.bitmap for matrix in matrices if matrix.case != REFERENCE_CASE]
    size = published_size("arb-rc", True, LLAMA_7B)
    billm = published_bytes("billm", LLAMA_7B, cgb=False) - LLAMA_7B.dense_bytes
    typical = min(bitmaps, key=lambda bitmap: abs(bitmap.share - 0.3))
    return {
        "salient": SALIENT_SHARE,
        "binary": published_bytes("arb-rc", LLAMA_7B, cgb=True) / 2**30,
        "half": [half_precision_bytes(shape) / 1e9 for shape in SHAPES],
        "needless": (billm - published_size("billm", False, LLAMA_7B).nbytes) / 1e9,
        "nominal": size.nominal_bits,
        "true": size.true_bits,
        "bitmap": size.bits_per_weight["group_bitmap"],
        "row_scales": size.bits_per_weight["row_scales"],
        "sparse": next(p / 1e5 for p in range(1, 50_000) if entropy(p / 1e5) >= SALIENT_SHARE),
        "rows": RANDOM_ROWS,
        "columns": RANDOM_COLUMNS,
        "low": min(bitmap.share for bitmap in ours),
        "high": max(bitmap.share for bitmap in ours),
        "least": min(1 - bitmap.bits("entropy") for bitmap in ours),
        "most": max(1 - bitmap.bits("entropy") for bitmap in ours),
        "overhead": max(matrix.bitmap.bits("entropy") - matrix.bitmap.entropy for matrix in matrices),
        "seconds": typical.decoding / typical.weights * LLAMA_7B.linear_weights,
    }


def published_size(method: str, cgb: bool, shape: ModelShape) -> StorageSize:
    """What our layouts store of the linears of a model by one of the paper's methods."""
    return model_linears(shape, partial(published_layout, method, cgb=cgb))


def model_linears(shape: ModelShape, layout: Callable[[int, int], Layout]) -> StorageSize:
    """What the linears of a model store; `layout` gives the layout of n rows and m columns."""
    return total_size(shape.blocks * [layout(rows, columns) for rows, columns in shape.linears])


def rounded_bytes(shape: ModelShape) -> int:
    """Bytes of all but the linears with embedding and head in 8 bits."""
    table = RowLayout(shape.vocabulary, shape.width)
    return shape.dense_bytes - 2 * (2 * table.weights - table.nbytes)


def named(method: str, cgb: bool) -> str:
    """A method as the tables name it."""
    return f"{method} + CGB" if cgb else method


def entropy(share: float) -> float:
    """H(p) in bits."""
    return -share * log2(share) - (1 - share) * log2(1 - share)


if __name__ == "__main__":
    main()
