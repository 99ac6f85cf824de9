"""How many bits the columns of a matrix get, so that it spends what it may: segments of two neighbouring kinds."""

from __future__ import annotations

from itertools import pairwise

from arbllm.errors import ConfigError
from arbllm.format.accounting import matrix_size
from arbllm.format.layout import Layout, Segment

KINDS = ((1, 1), (2, 1), (2, 2), (4, 2))
"""(groups, terms) of columns of 1, 2, 3 and 4 bits a weight, not counting scales."""
COLUMNS_AT_A_TIME = 8  # segments begin at whole bytes


def joint_layout(rows: int, columns: int, bits: float, scale_block: int) -> Layout:
    """The layout for ARB-RCX that comes nearest to `bits` from below.

    Columns are of two kinds, b and b + 1 bits before scales: of all mixtures with the same bits it has the least error,
    since the error falls by the same factor of about 3.7 with each bit.

    Args:
        rows: n.
        columns: m.
        bits: true bits a weight, everything counted.
        scale_block: columns of a segment, about.

    Raises:
        ConfigError: even one bit a column costs more, scales included.
    """
    for kind in range(len(KINDS) - 1, -1, -1):
        if _bits(rows, columns, kind, 0, scale_block) <= bits:
            break
    else:
        least = _bits(rows, columns, 0, 0, scale_block)
        raise ConfigError(
            f"a {rows} x {columns} matrix takes at least {least:.3f} bits a weight with its scales, "
            f"more than {bits:g}; ask for more bits"
        )
    if kind == len(KINDS) - 1:
        return _layout(rows, columns, kind, 0, scale_block)
    low, high = 0, columns // COLUMNS_AT_A_TIME
    while low < high:
        middle = (low + high + 1) // 2
        if _bits(rows, columns, kind, COLUMNS_AT_A_TIME * middle, scale_block) <= bits:
            low = middle
        else:
            high = middle - 1
    return _layout(rows, columns, kind, COLUMNS_AT_A_TIME * low, scale_block)


def _bits(rows: int, columns: int, kind: int, better: int, scale_block: int) -> float:
    return matrix_size(_layout(rows, columns, kind, better, scale_block)).true_bits


def _layout(rows: int, columns: int, kind: int, better: int, scale_block: int) -> Layout:
    """Columns of one kind, then `better` columns of the next."""
    segments = _cut(columns - better, kind, scale_block)
    if better:
        segments += _cut(better, kind + 1, scale_block)
    return Layout(
        rows=rows,
        columns=columns,
        segments=tuple(segments),
        ordering="segments" if len(segments) > 1 else "natural",
        block_size=0,
        scale_bits=8,
        row_means=False,
        column_scaled=True,
    )


def _cut(columns: int, kind: int, scale_block: int) -> list[Segment]:
    """Segments of about the same width, as near to `scale_block` as can be, beginning at whole bytes."""
    count = max(1, round(columns / scale_block))
    ends = [round(columns * place / count / COLUMNS_AT_A_TIME) * COLUMNS_AT_A_TIME for place in range(count)] + [
        columns
    ]
    return [Segment(end - start, *KINDS[kind]) for start, end in pairwise(ends)]
