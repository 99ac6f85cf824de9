"""Packed matrices of all kinds, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from tests.helpers import random_matrix, random_packed

GROUPS = st.sampled_from([1, 2, 4])
SEEDS = st.integers(0, 2**31)


@st.composite
def segments(draw: st.DrawFn, most: int = 9, trellis: bool = False) -> list[Segment]:
    """One to `most` segments, so that runs of one kind, and more changes of kind than a run each allows, occur.

    With `trellis` some of them have one.
    """
    widths = st.integers(1, 20)
    kinds = st.builds(Segment, widths, GROUPS, st.sampled_from([1, 2]), st.just(False))
    if trellis:
        kinds |= st.builds(Segment, widths, st.just(1), st.sampled_from([1, 2, 3, 4]), st.just(True))
    return draw(st.lists(kinds, min_size=1, max_size=most))


@st.composite
def matrices(draw: st.DrawFn) -> BinaryMatrix:
    """Random matrices: in blocks with a column bitmap, or in any segments in any other order."""
    rows, scale_bits, row_means = draw(st.integers(1, 60)), draw(st.sampled_from([8, 16])), draw(st.booleans())
    column_scaled, seed = draw(st.booleans()), draw(SEEDS)
    if draw(st.booleans()):
        columns = draw(st.integers(1, 70))
        return random_matrix(
            rows,
            columns,
            groups=draw(GROUPS),
            salient_groups=draw(GROUPS),
            salient=draw(st.integers(0, columns)),
            block_size=draw(st.sampled_from([8, 13, 32, 128])),
            row_means=row_means,
            column_scaled=column_scaled,
            scale_bits=scale_bits,
            seed=seed,
        )
    if trellis := draw(st.booleans()):
        row_means, column_scaled = False, True
    drawn = draw(segments(trellis=trellis))
    orderings = ["natural", "segments", "explicit"] if len(drawn) > 1 else ["natural", "explicit"]
    layout = Layout(
        rows=rows,
        columns=sum(segment.width for segment in drawn),
        segments=tuple(drawn),
        ordering=draw(st.sampled_from(orderings)),
        block_size=0,
        scale_bits=scale_bits,
        row_means=row_means,
        column_scaled=column_scaled,
    )
    layout.check()
    return random_packed(layout, seed)
