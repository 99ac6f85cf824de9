"""A budget of bits: divided among the linears of a model, and spent on the columns of each matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import log
from operator import mul

from arbllm.config import FEWEST_BITS, MOST_BITS
from arbllm.errors import ConfigError
from arbllm.format.accounting import matrix_size
from arbllm.format.layout import Layout, Segment

KINDS = ((1, 1, False), (2, 1, False), (2, 2, False), (4, 2, False))
TRELLIS_KINDS = ((1, 1, True), (1, 2, True), (1, 3, True), (1, 4, True))
"""(groups, terms, trellis) of columns of 1, 2, 3 and 4 bits a weight, not counting scales."""
OUTLIER = Segment(1, 1, 1)
ERROR_PER_BIT = 3.4  # by which the output error falls with each bit a weight, as measured on real matrices
BISECTIONS = 24
TINY = 1e-30
COLUMNS_AT_A_TIME = 8  # segments begin at whole bytes
SAVED_BY_A_SEGMENT = 8  # times COLUMNS_AT_A_TIME: more than the columns that its row scales would pay for


def joint_layout(
    rows: int, columns: int, bits: float, scale_block: int, outliers: int = 0, trellis: bool = True
) -> Layout:
    """The layout for ARB-RCX that comes nearest to `bits` from below.

    Columns are of two kinds, b and b + 1 bits before scales: of all mixtures with the same bits it has the least error,
    since the error falls by about the same factor, ERROR_PER_BIT, with each bit.

    Args:
        rows: n.
        columns: m.
        bits: true bits a weight, everything counted.
        scale_block: columns of a segment, about.
        outliers: columns that each get a segment of their own, the last ones, if the bits allow it: row scales of 8
            bits then describe every weight to 1.5 %.
        trellis: whether columns are those of a trellis code, or have groups.

    Raises:
        ConfigError: even one bit a column costs more, scales included.
    """
    shape = rows, columns, scale_block, outliers, trellis
    for kind in range(len(KINDS) - 1, -1, -1):
        if _bits(*shape, kind) <= bits:
            break
    else:
        if outliers:
            return joint_layout(rows, columns, bits, scale_block, trellis=trellis)
        least = _bits(*shape, 0)
        raise ConfigError(
            f"a {rows} x {columns} matrix takes at least {least:.3f} bits a weight with its scales, "
            f"more than {bits:g}; ask for more bits"
        )
    if kind == len(KINDS) - 1:
        return _layout(*shape, kind)
    low, high = 0, (columns - outliers) // COLUMNS_AT_A_TIME
    while low < high:
        middle = (low + high + 1) // 2
        if _bits(*shape, kind, COLUMNS_AT_A_TIME * middle) <= bits:
            low = middle
        else:
            high = middle - 1
    # Not quite a bisection: where one segment less of the cheaper kind is needed, more columns cost less than fewer.
    for further in range(min(low + SAVED_BY_A_SEGMENT, (columns - outliers) // COLUMNS_AT_A_TIME), low, -1):
        if _bits(*shape, kind, COLUMNS_AT_A_TIME * further) <= bits:
            low = further
            break
    return _layout(*shape, kind, COLUMNS_AT_A_TIME * low)


def _bits(rows: int, columns: int, scale_block: int, outliers: int, trellis: bool, kind: int, better: int = 0) -> float:
    return matrix_size(_layout(rows, columns, scale_block, outliers, trellis, kind, better)).true_bits


def _layout(
    rows: int, columns: int, scale_block: int, outliers: int, trellis: bool, kind: int, better: int = 0
) -> Layout:
    """Columns of one kind, then `better` columns of the next, then outliers."""
    kinds = TRELLIS_KINDS if trellis else KINDS
    segments = _cut(columns - outliers - better, kinds[kind], scale_block) if columns > outliers + better else []
    if better:
        segments += _cut(better, kinds[kind + 1], scale_block)
    segments += [OUTLIER] * outliers
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


def _cut(columns: int, kind: tuple[int, int, bool], scale_block: int) -> list[Segment]:
    """Segments of about the same width, as near to `scale_block` as can be, beginning at whole bytes."""
    count = max(1, round(columns / scale_block))
    ends = [round(columns * place / count / COLUMNS_AT_A_TIME) * COLUMNS_AT_A_TIME for place in range(count)] + [
        columns
    ]
    return [Segment(end - start, *kind) for start, end in pairwise(ends)]


@dataclass(frozen=True)
class Demand:
    """What a linear asks of the budget.

    Attributes:
        rows: n.
        columns: m.
        worth: what the model's loss rises by, up to a common factor, times ERROR_PER_BIT for each bit a weight spent.
    """

    rows: int
    columns: int
    worth: float


def allocate(demands: Mapping[str, Demand], bits: float, scale_block: int, trellis: bool = True) -> dict[str, float]:
    """Divide a budget among linears so that the model's loss rises least.

    The rise is the sum of worth * ERROR_PER_BIT^-b; with a Lagrange multiplier its least lies where each linear's bits
    are log(worth / weights) / log(ERROR_PER_BIT) plus a constant, which a bisection finds.

    Args:
        demands: of every linear by name.
        bits: true bits a weight over all of them.
        scale_block: see `joint_layout`.
        trellis: see `joint_layout`.

    Returns:
        Bits a weight by name.

    Raises:
        ConfigError: even one bit a weight everywhere costs more, or more than MOST_BITS somewhere; names the linear.
    """
    weights = {name: demand.rows * demand.columns for name, demand in demands.items()}
    wishes = {name: log(max(demand.worth, TINY) / weights[name], ERROR_PER_BIT) for name, demand in demands.items()}
    least = {
        name: max(FEWEST_BITS, _bits(demand.rows, demand.columns, scale_block, 0, trellis, 0))
        for name, demand in demands.items()
    }
    for name, bits_there in least.items():
        if bits_there > MOST_BITS:
            raise ConfigError(
                f"{name}: {demands[name].rows} x {demands[name].columns} weights take {bits_there:.3f} bits each with "
                f"their scales, more than {MOST_BITS}; choose another method"
            )
    total = sum(weights.values())
    if (floor := sum(least[name] * weights[name] for name in demands) / total) > bits:
        raise ConfigError(
            f"the linears take at least {floor:.3f} bits a weight with scales, more than {bits:g}; "
            f"choose {math.ceil(100 * floor) / 100:g} or more"
        )

    def spend(level: float) -> dict[str, float]:
        return {name: min(MOST_BITS, max(least[name], wish + level)) for name, wish in wishes.items()}

    def spent(level: float) -> float:
        wanted = spend(level)
        alike = Counter((demand.rows, demand.columns, wanted[name]) for name, demand in demands.items())  # experts are
        sizes = (matrix_size(joint_layout(*matrix, scale_block, trellis=trellis)).nbytes for matrix in alike)
        return 8 * sum(map(mul, sizes, alike.values())) / total

    low, high = -max(wishes.values()), MOST_BITS - min(wishes.values())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= bits else (low, middle)
    return spend(low)
