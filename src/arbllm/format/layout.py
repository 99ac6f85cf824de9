"""The shape of one packed matrix: which tensors it stores, their dtypes and sizes.

Everything that must agree on sizes (packing, loading onto the meta device, checking a file, counting bits) asks
a `Layout`, so a stored byte is described once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from arbllm.errors import CheckpointError

GROUP_COUNTS = (1, 2, 4)
TERM_COUNTS = (1, 2)
TRELLIS_TERM_COUNTS = (1, 2, 3, 4)
ORDERINGS = ("natural", "bitmap", "segments", "explicit")
SCALE_BITS = (8, 16)
LARGEST_SHORT_ORDER = 32767
LARGEST_SIZE = 2**31 - 1


def packed_bytes(bits: int) -> int:
    """Bytes that hold `bits` bits, eight to a byte."""
    return (bits + 7) // 8


class Segment(NamedTuple):
    """Stored columns that follow each other and are of one kind.

    Attributes:
        width: number of columns, at least 1.
        groups: zones of a row, each with its own scales: 1, 2 or 4.
        terms: signs of a weight that are stored: 1, or 2 for salient columns; with a trellis 1 to 4.
        trellis: whether signs are those of a trellis code (see `arbllm.format.trellis`): a weight of 1 to 4 signs then
            has one of 2^(terms + 1) levels, times the one scale of its row and the one scale of its column.
    """

    width: int
    groups: int
    terms: int
    trellis: bool = False

    @property
    def bits(self) -> int:
        """Bits of one weight without its scales: its signs, and its group number."""
        return self.terms + self.groups.bit_length() - 1

    @property
    def slots(self) -> int:
        """Row scales of a row, and column scales of a column."""
        return 1 if self.trellis else self.groups * self.terms


class Place(NamedTuple):
    """Where the columns and the parameters of a segment begin, in the tensors of `Layout.tensors`.

    Attributes:
        segment: which columns.
        column: first stored column.
        row_scale: first row scale of a row; group g, term t is at `row_scale + g * terms + t`, a trellis has this one.
        row_mean: first row mean of a row; group g is at `row_mean + g`.
        column_scale: first column scale; those of group g, term t begin at `column_scale + (g * terms + t) * width`.
        low: first column in `group_bitmap`, where the segment has 2 groups or more.
        high: first column in `group_bitmap_high`, where it has 4.
        second: first column in `second_signs`, where it has two terms or more.
        third: first column in `third_signs`, where it has three terms or more.
        fourth: first column in `fourth_signs`, where it has four terms.
    """

    segment: Segment
    column: int
    row_scale: int
    row_mean: int
    column_scale: int
    low: int
    high: int
    second: int
    third: int
    fourth: int


@dataclass(frozen=True)
class Layout:
    """Sizes of one packed matrix of `rows` outputs and `columns` inputs.

    Columns are stored in an order of their own and cut into segments. In a segment of G groups and T terms a row has
    G * T row scales (group-major) and, in methods that use them, G row means; in one with a trellis, one row scale.

    Attributes:
        rows: n, output features.
        columns: m, input features.
        segments: the stored columns, first to last; their widths add up to `columns`.
        ordering: which column each stored column is. `natural`: the same; `bitmap`: those of each block of `block_size`
            columns, the regular ones before the salient ones that the column bitmap marks; `segments`: those of each
            segment in natural order, the number of each column's segment being stored; `explicit`: as the column order
            lists them.
        block_size: columns of a block with ordering `bitmap` (the last may be shorter), else 0.
        scale_bits: of row and column scales: 16 for float16, 8 for codes (see `arbllm.binarize.scales`) with a float16
            step for each row scale slot.
        row_means: whether the method stores row means.
        column_scaled: whether the method stores column scales.
    """

    rows: int
    columns: int
    segments: tuple[Segment, ...]
    ordering: str
    block_size: int
    scale_bits: int
    row_means: bool
    column_scaled: bool

    @property
    def weights(self) -> int:
        """Number of weights, n * m."""
        return self.rows * self.columns

    @property
    def salient(self) -> int:
        """Number of columns with two signs a weight or more, which have a second one in `second_signs`."""
        return self.columns_of_terms(2)

    def columns_of_terms(self, terms: int) -> int:
        """Number of columns with so many signs a weight or more."""
        return sum(segment.width for segment in self.segments if segment.terms >= terms)

    @property
    def signs(self) -> int:
        """Stored signs of a row."""
        return sum(segment.width * segment.terms for segment in self.segments)

    @property
    def has_trellis(self) -> bool:
        """Whether signs of any segment are those of a trellis code."""
        return any(segment.trellis for segment in self.segments)

    @property
    def grouped_columns(self) -> int:
        """Number of columns with two groups or more, which have a bit of the group number in `group_bitmap`."""
        return sum(segment.width for segment in self.segments if segment.groups >= 2)

    @property
    def quartered_columns(self) -> int:
        """Number of columns with four groups, which have a second bit of it in `group_bitmap_high`."""
        return sum(segment.width for segment in self.segments if segment.groups == 4)

    @property
    def row_scale_slots(self) -> int:
        """Row scales of one row."""
        return sum(segment.slots for segment in self.segments)

    @property
    def row_mean_slots(self) -> int:
        """Row means of one row; 0 where the method has none."""
        return sum(segment.groups for segment in self.segments) if self.row_means else 0

    @property
    def column_scale_slots(self) -> int:
        """Column scales of the whole matrix; 0 where the method has none."""
        return sum(segment.slots * segment.width for segment in self.segments) if self.column_scaled else 0

    @property
    def segment_planes(self) -> int:
        """Bits of a segment's number."""
        return (len(self.segments) - 1).bit_length()

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where each segment begins in each tensor."""
        found = []
        column = row_scale = row_mean = column_scale = low = high = second = third = fourth = 0
        for segment in self.segments:
            found.append(Place(segment, column, row_scale, row_mean, column_scale, low, high, second, third, fourth))
            column += segment.width
            row_scale += segment.slots
            row_mean += segment.groups
            column_scale += segment.slots * segment.width
            low += segment.width if segment.groups >= 2 else 0
            high += segment.width if segment.groups == 4 else 0
            second += segment.width if segment.terms >= 2 else 0
            third += segment.width if segment.terms >= 3 else 0
            fourth += segment.width if segment.terms >= 4 else 0
        return tuple(found)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor that this matrix stores, in file order.

        Absent parts are left out: no group bitmap with one group, no second signs without salient columns.
        """
        n, m = self.rows, self.columns
        short = torch.int16 if m <= LARGEST_SHORT_ORDER else torch.int32
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"signs": (torch.uint8, (n, packed_bytes(m)))}
        for name, width in (
            ("group_bitmap", self.grouped_columns),
            ("group_bitmap_high", self.quartered_columns),
            ("second_signs", self.salient),
            ("third_signs", self.columns_of_terms(3)),
            ("fourth_signs", self.columns_of_terms(4)),
        ):
            if width:
                stored[name] = (torch.uint8, (n, packed_bytes(width)))
        scale = torch.uint8 if self.scale_bits == 8 else torch.float16
        stored["row_scales"] = (scale, (n, self.row_scale_slots))
        if self.row_means:
            stored["row_means"] = (torch.float16, (n, self.row_mean_slots))
        if self.column_scaled:
            stored["column_scales"] = (scale, (self.column_scale_slots,))
        if self.scale_bits == 8:
            stored["scale_steps"] = (torch.float16, (self.row_scale_slots,))
        if self.ordering == "bitmap":
            stored["column_bitmap"] = (torch.uint8, (packed_bytes(m),))
        if self.ordering == "segments":
            stored["column_segments"] = (torch.uint8, (self.segment_planes, packed_bytes(m)))
        if self.ordering == "explicit":
            stored["column_order"] = (short, (m,))
        return stored

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; a segment is a list [width, groups, terms, trellis]."""
        return {**asdict(self), "segments": [list(segment) for segment in self.segments]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str = "matrix") -> Layout:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: a field is missing, unknown or not of its type; `name` is in the message.
        """
        try:
            layout = cls(**{**values, "segments": _read_segments(values.get("segments"))})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{name}: its layout in config.json is not readable ({error})") from error
        layout.check(name)
        return layout

    def check(self, name: str = "matrix") -> None:
        """Refuse sizes that no matrix can have.

        Raises:
            CheckpointError: naming `name` and the field.
        """
        for field in ("rows", "columns"):
            if type(getattr(self, field)) is not int or not 1 <= getattr(self, field) <= LARGEST_SIZE:
                raise CheckpointError(f"{name}: {field} must be a positive whole number, not {getattr(self, field)!r}")
        for segment in self.segments:
            if not _is_sound(segment):
                raise CheckpointError(
                    f"{name}: a segment must have a width of at least 1, {GROUP_COUNTS} groups and {TERM_COUNTS} "
                    f"terms, or one group and {TRELLIS_TERM_COUNTS} terms with a trellis, not {list(segment)}"
                )
        if (width := sum(segment.width for segment in self.segments)) != self.columns:
            raise CheckpointError(f"{name}: its segments have {width} columns, the matrix has {self.columns}")
        for field, allowed in (("ordering", ORDERINGS), ("scale_bits", SCALE_BITS)):
            value = getattr(self, field)
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise CheckpointError(f"{name}: {field} must be one of {allowed}, not {value!r}")
        if self.ordering == "segments" and len(self.segments) < 2:
            raise CheckpointError(f"{name}: ordering 'segments' needs two segments or more")
        sized = type(self.block_size) is int and 0 <= self.block_size <= LARGEST_SIZE
        if not sized or (self.block_size > 0) != (self.ordering == "bitmap"):
            raise CheckpointError(
                f"{name}: block_size must be a positive whole number with ordering 'bitmap', and 0 with another, "
                f"not {self.block_size!r}"
            )
        for field in ("row_means", "column_scaled"):
            if type(getattr(self, field)) is not bool:
                raise CheckpointError(f"{name}: {field} must be true or false, not {getattr(self, field)!r}")
        if self.has_trellis and (self.row_means or not self.column_scaled):
            raise CheckpointError(f"{name}: a trellis has column scales and no row means")


def _read_segments(values: Any) -> tuple[Segment, ...]:
    """Segments from lists [width, groups, terms, trellis]; what they hold is checked later.

    Raises:
        ValueError: not a list of lists of four.
    """
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, (list, tuple)) and len(v) == 4 for v in values):
        raise ValueError("segments must be a list of [width, groups, terms, trellis]")
    return tuple(Segment(*value) for value in values)


def _is_sound(segment: Segment) -> bool:
    if type(segment.trellis) is not bool or any(type(value) is not int for value in segment[:3]) or segment.width < 1:
        return False
    if segment.trellis:
        return segment.groups == 1 and segment.terms in TRELLIS_TERM_COUNTS
    return segment.groups in GROUP_COUNTS and segment.terms in TERM_COUNTS
