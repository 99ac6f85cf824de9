"""A matrix with a trellis as one of plain segments alone, for kernels that know no other.

With s_0 to s_k the signs of a weight of k stored signs (see `arbllm.binarize.code`), its level is the sum of two of
them times scales that depend on whether s_1 and s_2 agree with s_0. That is what a plain segment holds: two signs, and
in the group number which others agree. With k = 4 a third sign is in the sum, whose scale depends on s_1 alone: it gets
a segment of its own over the same columns, which are then there twice.

A weight then takes k + 1 bits of memory in place of k, and with k = 4 it takes 6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.code import derived_planes, level_values
from arbllm.format.bitplanes import pack, unpack
from arbllm.format.layout import Place, Segment
from arbllm.format.matrix import BinaryMatrix

SIGN_TENSORS = ("signs", "second_signs")
GROUP_TENSORS = ("group_bitmap", "group_bitmap_high")
TILE_BITS = 2**26
"""Bits that are unpacked at a time, to a byte each."""


class LevelPart(NamedTuple):
    """The part of a level that one plain segment holds.

    Attributes:
        signs: which signs, one a term.
        grouping: signs that differ from s_0 where the bit of the group number is set, the low bit's first.
    """

    signs: tuple[int, ...]
    grouping: tuple[int, ...] = ()

    def segment(self, width: int) -> Segment:
        """The plain segment."""
        return Segment(width, 1 << len(self.grouping), len(self.signs))


PARTS = {
    1: (LevelPart(signs=(0, 1)),),
    2: (LevelPart(signs=(0, 2), grouping=(1,)),),
    3: (LevelPart(signs=(0, 3), grouping=(1, 2)),),
    4: (LevelPart(signs=(0, 3), grouping=(1, 2)), LevelPart(signs=(4,), grouping=(1,))),
}
"""What levels are the sum of, by the number of stored signs."""


class _Piece(NamedTuple):
    """A plain segment, and the segment that it comes from: all of it, or a part of its levels."""

    segment: Segment
    place: Place
    part: LevelPart | None = None


def expanded(matrix: BinaryMatrix) -> BinaryMatrix:
    """The same weights in plain segments; a matrix without a trellis is returned as it is.

    Args:
        matrix: on any device; the result is on the same.

    Returns:
        A matrix for kernels, not for files. Its columns are those of plain segments, in their order; the column order
        (ordering `explicit`) gives a natural column once for each of them, and its weight is their sum. So that nothing
        is rounded, steps are float32, or row scales where there are no codes.
    """
    layout = matrix.layout
    if not layout.has_trellis:
        return matrix
    pieces = [piece for place in layout.places for piece in _pieces(place)]
    segments = tuple(piece.segment for piece in pieces)
    columns = sum(segment.width for segment in segments)
    tensors: dict[str, Any] = _planes(matrix, pieces) | _scales(matrix, pieces)
    return BinaryMatrix(
        layout=replace(layout, columns=columns, segments=segments, ordering="explicit", block_size=0),
        explicit_order=_order(matrix, pieces),
        **tensors,
    )


def part_scales(terms: int, part: LevelPart) -> list[float]:
    """The scales of a part, group-major: the mean of the group's levels, each times the sign.

    Other signs of a sum cancel in that mean, as a group has both values of each beside either value of this one.

    Args:
        terms: stored signs of a weight, 1 to 4.
        part: one of `PARTS[terms]`.
    """
    _, groups, count, _ = part.segment(1)
    sums = [0.0] * (groups * count)
    for bits, level in zip(product((0, 1), repeat=terms + 1), level_values(terms), strict=True):
        group = sum((bits[0] ^ bits[sign]) << place for place, sign in enumerate(part.grouping))
        for term, sign in enumerate(part.signs):
            sums[group * count + term] += level if bits[sign] else -level
    return [total * groups / (2 << terms) for total in sums]


def _pieces(place: Place) -> Iterator[_Piece]:
    width, _, terms, trellis = place.segment
    if trellis:
        for part in PARTS[terms]:
            yield _Piece(part.segment(width), place, part)
    else:
        yield _Piece(place.segment, place)


def _order(matrix: BinaryMatrix, pieces: Sequence[_Piece]) -> Tensor:
    """The natural column of each column of the pieces, int32."""
    order = matrix.column_order()
    natural = torch.arange(matrix.layout.columns, device=matrix.signs.device) if order is None else order
    starts = ((piece.place.column, piece.segment.width) for piece in pieces)
    return torch.cat([natural[start : start + width] for start, width in starts]).int()


def _planes(matrix: BinaryMatrix, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
    """The packed tensors of signs and group numbers that the pieces have."""
    layout = matrix.layout
    size = max(1, TILE_BITS // (layout.signs + 2 * layout.columns))
    found = defaultdict(list)
    for start in range(0, layout.rows, size):
        bits = _stored_bits(matrix, slice(start, min(start + size, layout.rows)))
        tile = defaultdict(list)
        for piece in pieces:
            for name, plane in _piece_bits(piece, bits):
                tile[name].append(plane)
        for name, planes in tile.items():
            found[name].append(pack(torch.cat(planes, 1)))
    return {name: torch.cat(tiles) for name, tiles in found.items()}


def _stored_bits(matrix: BinaryMatrix, rows: slice) -> dict[str, Tensor]:
    """Some rows of all tensors of bits by name, and of the derived `z1` and `z0`, bool (rows, columns of each)."""
    layout = matrix.layout
    widths = {"signs": layout.columns, "group_bitmap": layout.grouped_columns}
    widths["group_bitmap_high"] = layout.quartered_columns
    further = ("second_signs", "third_signs", "fourth_signs")
    widths |= {name: layout.columns_of_terms(terms) for terms, name in enumerate(further, start=2)}
    bits = {name: unpack(getattr(matrix, name)[rows], width) for name, width in widths.items() if width}
    derived = derived_planes(matrix.signs, rows)
    return bits | {name: unpack(plane, layout.columns) for name, plane in zip(("z1", "z0"), derived, strict=True)}


def _piece_bits(piece: _Piece, bits: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The bits of a piece, bool (rows, width), each with the name of the tensor that they belong to."""
    (width, groups, terms, _), place, part = piece
    signs = [("signs", place.column), ("second_signs", place.second), ("third_signs", place.third)]
    signs += [("fourth_signs", place.fourth)]
    if part is None:
        group = [("group_bitmap", place.low), ("group_bitmap_high", place.high)][: groups.bit_length() - 1]
        for name, start in signs[:terms] + group:
            yield name, bits[name][:, start : start + width]
    else:
        sources = [*signs[1 : place.segment.terms], ("z1", place.column), ("z0", place.column)]
        values = [bits[name][:, start : start + width] for name, start in sources]
        for name, sign in zip(SIGN_TENSORS, part.signs, strict=False):
            yield name, values[sign]
        for name, sign in zip(GROUP_TENSORS, part.grouping, strict=False):
            yield name, values[0] ^ values[sign]


def _scales(matrix: BinaryMatrix, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
    """Row scales, column scales and steps: those of a trellis for each slot of its pieces, times the slot's scale."""
    device = matrix.signs.device
    slots: list[int] = []
    factors: list[float] = []
    columns = []
    for segment, place, part in pieces:
        own = place.segment.slots
        repeats = segment.slots // own
        slots += [*range(place.row_scale, place.row_scale + own)] * repeats
        factors += [1.0] * own if part is None else part_scales(place.segment.terms, part)
        columns.append(torch.arange(own * segment.width).repeat(repeats) + place.column_scale)
    assert matrix.column_scales is not None
    tensors = {
        "row_scales": matrix.row_scales[:, slots],
        "column_scales": matrix.column_scales[torch.cat(columns).to(device)],
    }
    name, values = "row_scales", tensors["row_scales"]
    if matrix.scale_steps is not None:
        name, values = "scale_steps", matrix.scale_steps[slots]
    return tensors | {name: values.float() * torch.tensor(factors, device=device)}
