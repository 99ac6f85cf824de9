"""Matrices with all features that a packed matrix can have, for tests of what runs on a GPU."""

from __future__ import annotations

from functools import partial

from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from tests.helpers import random_matrix, random_packed


def in_segments(
    rows: int, *segments: tuple[int, int, int] | tuple[int, int, int, bool], scale_bits: int = 8
) -> BinaryMatrix:
    """As arb-rcx stores them; a segment is (width, groups, terms), or with a fourth, true, for a trellis."""
    kinds = tuple(Segment(*segment) for segment in segments)
    layout = Layout(
        rows=rows,
        columns=sum(segment.width for segment in kinds),
        segments=kinds,
        ordering="segments" if len(kinds) > 1 else "natural",
        block_size=0,
        scale_bits=scale_bits,
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
    "trellis of few signs": partial(in_segments, 53, (61, 1, 1, True), (70, 1, 2, True), (1, 1, 1, True), (1, 1, 1)),
    "trellis of three signs": partial(in_segments, 46, (67, 1, 3, True)),
    "trellis of four signs": partial(in_segments, 43, (71, 1, 4, True)),
    "trellis of many rows": partial(in_segments, 203, (21, 1, 2, True), (9, 1, 4, True)),
    "trellis of many columns": partial(in_segments, 70, (1100, 1, 2, True), (300, 1, 3, True), *[(1, 1, 1)] * 19),
    "trellis and plain": partial(
        in_segments,
        51,
        (40, 2, 1),
        (33, 1, 3, True),
        (73, 1, 4, True),
        (24, 2, 2),
        (20, 4, 2),
        (1, 1, 4, True),
        *[(1, 1, 1)] * 3,
    ),
    "trellis, float16": partial(
        in_segments,
        45,
        (30, 1, 1, True),
        (20, 2, 1),
        (9, 1, 4, True),
        (10, 1, 3, True),
        (1, 1, 1),
        (1, 1, 2, True),
        scale_bits=16,
    ),
    "trellis of scales in float16": partial(
        in_segments, 45, (30, 1, 1, True), (9, 1, 4, True), (10, 1, 3, True), (1, 1, 1), scale_bits=16
    ),
    "many small segments": partial(in_segments, 40, *[(11, 2, 1), (37, 2, 1), (6, 1, 2)] * 5),
    "codes of rows alone": partial(random_matrix, 35, 90, salient=9, block_size=64, column_scaled=False, scale_bits=8),
    "codes of rows and means": partial(
        random_matrix, 18, 70, groups=4, salient=5, row_means=True, column_scaled=False, scale_bits=8
    ),
    "four groups of two signs and means": partial(
        random_matrix, 18, 60, groups=4, salient_groups=4, salient=30, row_means=True, ordering="explicit", scale_bits=8
    ),
    "no groups": partial(random_matrix, 18, 130, groups=1, row_means=True, scale_bits=8),
}
