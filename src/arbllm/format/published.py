"""Storage as the papers on ARB-LLM (arXiv 2410.03129) and BiLLM (arXiv 2402.04291) count it: formulas of shapes alone.

They stand beside `arbllm.format.accounting`, which counts what is stored: `published_layout` is what stores the same.
Blocks have 128 columns; all numbers that are not bits or signs have 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from arbllm.format.layout import Layout, Segment

BLOCK_SIZE = 128
NUMBER_BITS = 16
SALIENT_SHARE = 0.09
"""Salient columns over all columns. With this share the formulas give the paper's memory table."""
ROW_AND_COLUMN = "arb-rc"
METHODS = ("billm", "arb-x", ROW_AND_COLUMN)
GIGABYTES = {
    ("billm", False): ((2.93, 5.36), (2.19, 3.92)),
    ("arb-x", False): ((2.93, 5.36), (2.19, 3.92)),
    ("arb-x", True): ((3.23, 5.95), (2.49, 4.51)),
    (ROW_AND_COLUMN, False): ((2.63, 4.77), (1.89, 3.33)),
    (ROW_AND_COLUMN, True): ((2.83, 5.17), (2.09, 3.73)),
}
"""The paper's memory table: (method, with CGB) -> GB of LLaMA-7B and 13B, raw, and with what it calls CSR."""


@dataclass(frozen=True)
class ModelShape:
    """A LLaMA by its sizes.

    Attributes:
        width: of the hidden states.
        inner: width inside the feed-forward part.
        blocks: decoder blocks.
        vocabulary: tokens.
    """

    width: int
    inner: int
    blocks: int
    vocabulary: int = 32_000

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(rows n, columns m) of the linears of a decoder block: q, k, v, o, gate, up and down."""
        d, h = self.width, self.inner
        return [(d, d), (d, d), (d, d), (d, d), (h, d), (h, d), (d, h)]

    @property
    def linear_weights(self) -> int:
        """Weights of all linears of decoder blocks."""
        return self.blocks * sum(rows * columns for rows, columns in self.linears)

    @property
    def dense_bytes(self) -> int:
        """Bytes of embedding, head and norms, which have 16 bits a number."""
        norms = (2 * self.blocks + 1) * self.width
        return (2 * self.vocabulary * self.width + norms) * NUMBER_BITS // 8


LLAMA_7B = ModelShape(width=4096, inner=11_008, blocks=32)
LLAMA_13B = ModelShape(width=5120, inner=13_824, blocks=40)


def published_bits(
    method: str, rows: int, columns: int, *, cgb: bool, csr: bool = False, salient_share: float = SALIENT_SHARE
) -> float:
    """Bits of one linear as the paper counts them.

    Args:
        method: one of `METHODS`. Plain ARB counts as ARB-X does.
        rows: n.
        columns: m.
        cgb: whether salient columns are split into two groups too (the column-group bitmap).
        csr: count n c bits for the group bitmap, which the paper calls compressed sparse rows, in place of n m.
        salient_share: c / m.
    """
    n, m, c = rows, columns, salient_share * columns
    slots = ceil(m / BLOCK_SIZE) * n  # a number for each row of each block
    if method == ROW_AND_COLUMN:
        salient = 2 * slots + 2 * c  # two row scales, two column scales
        regular = slots + (m - c)  # one of each
    else:
        salient = 3 * slots  # a mean, two scales
        regular = 2 * slots  # a mean, a scale
    numbers = salient * (2 if cgb else 1) + regular * 2
    signs = 2 * n * c + n * (m - c)
    group_bitmap = n * c if csr else n * m
    return signs + numbers * NUMBER_BITS + group_bitmap + m


def published_bytes(
    method: str, shape: ModelShape, *, cgb: bool, csr: bool = False, salient_share: float = SALIENT_SHARE
) -> float:
    """Bytes of a model as the paper counts them; see `published_bits`. Its GB are 10^9 bytes."""
    linears = (published_bits(method, n, m, cgb=cgb, csr=csr, salient_share=salient_share) for n, m in shape.linears)
    return shape.blocks * sum(linears) / 8 + shape.dense_bytes


def half_precision_bytes(shape: ModelShape) -> int:
    """Bytes of the model with 16 bits a weight."""
    return shape.linear_weights * NUMBER_BITS // 8 + shape.dense_bytes


def published_layout(
    method: str, rows: int, columns: int, *, cgb: bool, salient_share: float = SALIENT_SHARE
) -> Layout:
    """A layout that stores what `published_bits` counts, the salient columns spread evenly over the blocks."""
    segments = []
    for start in range(0, columns, BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, columns)
        salient = round(salient_share * stop) - round(salient_share * start)
        segments += [Segment(stop - start - salient, 2, 1), Segment(salient, 2 if cgb else 1, 2)]
    return Layout(
        rows=rows,
        columns=columns,
        segments=tuple(segment for segment in segments if segment.width),
        ordering="bitmap",
        block_size=BLOCK_SIZE,
        scale_bits=NUMBER_BITS,
        row_means=method != ROW_AND_COLUMN,
        column_scaled=method == ROW_AND_COLUMN,
    )
