"""A matrix with a trellis as plain segments, for kernels that compute with no other.

With s_0 to s_k the signs of a weight of k stored signs (see `arbllm.binarize.code`), its level is the sum of two of
them times scales that depend on whether s_1 and s_2 agree with s_0. That is what a plain segment holds: two signs, and
in the group number which others agree. With k = 4 a third sign is in the sum, whose scale depends on s_1 alone: it gets
a segment of its own over the same columns.

Scales and the order of columns are made here. Bits are not: those of a plain segment follow from the k stored ones and
from first signs of rows above as the part of the level says that it holds, and a kernel puts them together as it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.code import level_values
from arbllm.format.layout import Layout, Place, Segment
from arbllm.format.matrix import BinaryMatrix


class LevelPart(NamedTuple):
    """The part of a level that one plain segment holds.

    Attributes:
        terms: stored signs of a weight.
        signs: which of the signs s_0 to s_k, one a term of the plain segment.
        grouping: signs that differ from s_0 where the bit of the group number is set, the low bit's first.
    """

    terms: int
    signs: tuple[int, ...]
    grouping: tuple[int, ...] = ()

    def segment(self, width: int) -> Segment:
        """The plain segment."""
        return Segment(width, 1 << len(self.grouping), len(self.signs))


PARTS = {
    1: LevelPart(1, signs=(0, 1)),
    2: LevelPart(2, signs=(0, 2), grouping=(1,)),
    3: LevelPart(3, signs=(0, 3), grouping=(1, 2)),
    4: LevelPart(4, signs=(0, 3), grouping=(1, 2)),
    5: LevelPart(4, signs=(4,), grouping=(1,)),
}
"""All parts by their number; levels are the sum of those of as many stored signs. 0 stands for a segment as it is."""


class Piece(NamedTuple):
    """A plain segment, and where its bits are.

    Attributes:
        place: of the segment among plain ones: of its scales.
        source: of the segment that it comes from in the stored matrix: of its bits.
        part: which of `PARTS` it is; 0 if it is stored as it is.
        row: the row scales of group 0, term 0, in `Expanded.row_scales`.
        row_step: from there to those of the next slot; 0 if all slots have the same, with steps of their own.
    """

    place: Place
    source: Place
    part: int
    row: int
    row_step: int

    @property
    def segment(self) -> Segment:
        """The plain segment."""
        return self.place.segment


@dataclass(frozen=True)
class Expanded:
    """A matrix as plain segments.

    Attributes:
        pieces: all segments, in the order of those that they come from.
        order: int32 or int64 (columns of all segments), the natural column of each; a column of four stored signs is
            there twice, and its weight is the sum. None if it is the same.
        row_scales: uint8 codes or float16, as stored; with a trellis and no codes, float32 (n, slots).
        scale_steps: (slots), what codes are multiplied by: float16, with a trellis float32, so that nothing is rounded.
            None without codes.
        column_scales: as stored, flat; None without any.
    """

    pieces: tuple[Piece, ...]
    order: Tensor | None
    row_scales: Tensor
    scale_steps: Tensor | None
    column_scales: Tensor | None


def expanded(matrix: BinaryMatrix) -> Expanded:
    """The same weights as plain segments; without a trellis, the matrix's own tensors.

    Args:
        matrix: on any device; the result is on the same.
    """
    layout = matrix.layout
    pieces = pieces_of(layout)
    order = matrix.column_order()
    if not layout.has_trellis:
        return Expanded(pieces, order, matrix.row_scales, matrix.scale_steps, matrix.column_scales)
    return Expanded(pieces, _order(matrix, order, pieces), *_scales(matrix, pieces))


def part_scales(part: LevelPart) -> list[float]:
    """The scales of a part, group-major: the mean of the group's levels, each times the sign.

    Other signs of a sum cancel in that mean, as a group has both values of each beside either value of this one.
    """
    _, groups, count, _ = part.segment(1)
    sums = [0.0] * (groups * count)
    for bits, level in zip(product((0, 1), repeat=part.terms + 1), level_values(part.terms), strict=True):
        group = sum((bits[0] ^ bits[sign]) << place for place, sign in enumerate(part.grouping))
        for term, sign in enumerate(part.signs):
            sums[group * count + term] += level if bits[sign] else -level
    return [total * groups / (2 << part.terms) for total in sums]


def pieces_of(layout: Layout) -> tuple[Piece, ...]:
    """The plain segments of a matrix of this layout."""
    found = [(place, number) for place in layout.places for number in _parts(place.segment)]
    segments = [PARTS[part].segment(place.segment.width) if part else place.segment for place, part in found]
    columns = sum(segment.width for segment in segments)
    plain = replace(layout, columns=columns, segments=tuple(segments), ordering="explicit", block_size=0)
    shared = layout.scale_bits == 8
    return tuple(
        Piece(place, source, part, (source if shared else place).row_scale, 0 if part and shared else 1)
        for place, (source, part) in zip(plain.places, found, strict=True)
    )


def _parts(segment: Segment) -> list[int]:
    """Numbers of the parts that a segment is the sum of."""
    return [number for number, part in PARTS.items() if part.terms == segment.terms] if segment.trellis else [0]


def _order(matrix: BinaryMatrix, order: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
    natural = torch.arange(matrix.layout.columns, device=matrix.signs.device) if order is None else order
    starts = ((piece.source.column, piece.segment.width) for piece in pieces)
    return torch.cat([natural[start : start + width] for start, width in starts]).int()


def _scales(matrix: BinaryMatrix, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Row scales, steps and column scales: of a trellis for each slot of its pieces, and times the slot's scale.

    That scale goes into the steps where there are some, so that codes of rows stay as they are.
    """
    device = matrix.signs.device
    slots: list[int] = []
    numbers: list[float] = []
    columns = []
    for place, source, part, *_ in pieces:
        own = source.segment.slots
        repeats = place.segment.slots // own
        slots += [*range(source.row_scale, source.row_scale + own)] * repeats
        numbers += part_scales(PARTS[part]) if part else [1.0] * own
        columns.append(torch.arange(own * place.segment.width).repeat(repeats) + source.column_scale)
    assert matrix.column_scales is not None, "a trellis has column scales"
    column_scales = matrix.column_scales[torch.cat(columns).to(device)]
    factors = torch.tensor(numbers, dtype=torch.float32, device=device)
    if matrix.scale_steps is None:
        return matrix.row_scales[:, slots].float() * factors, None, column_scales
    return matrix.row_scales, matrix.scale_steps[slots].float() * factors, column_scales
