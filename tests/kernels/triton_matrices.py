"""Matrices with all features that a packed matrix can have, for tests of what runs on a GPU."""

from __future__ import annotations

from functools import partial

from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from tests.helpers import random_matrix, random_packed


def in_segments(rows: int, *segments: tuple[int, int, int]) -> BinaryMatrix:
    """As arb-rcx stores them."""
    kinds = tuple(Segment(*segment) for segment in segments)
    layout = Layout(
        rows=rows,
        columns=sum(segment.width for segment in kinds),
        segments=kinds,
        ordering="segments" if len(kinds) > 1 else "natural",
        block_size=0,
        scale_bits=8,
        row_means=False,
        column_scaled=True,
    )
    return random_packed(layout)


MATRICES = {
    "arb-rcx": partial(in_segments, 37, (56, 2, 1), (64, 2, 1), (72, 2, 2), (1, 1, 1), (1, 1, 1)),
    "arb-rcx of four bits": partial(in_segments, 21, (40, 2, 2), (80, 4, 2)),
    "outliers alone": partial(in_segments, 6, *[(1, 1, 1)] * 19),
    "arb-rc": partial(random_matrix, 35, 150, salient=13, block_size=64),
    "arb-x": partial(random_matrix, 35, 100, salient=9, block_size=64, row_means=True, column_scaled=False),
    "four groups": partial(
        random_matrix, 18, 70, groups=4, salient_groups=1, salient=9, row_means=True, ordering="explicit", scale_bits=8
    ),
    "no groups": partial(random_matrix, 18, 130, groups=1, row_means=True, scale_bits=8),
}
