"""Where a matrix that is prepared for a GPU (`triton_layout.Prepared`) has what: it follows from the layout alone.

A word of 32 bits holds a stored bit of 32 columns of one row. Segments of a kind lie together, column by column, and
their columns are filled up to whole words; each segment with a trellis lies alone. The words of all rows follow each
other, those of one stored bit before those of the next, and zeros before them all: the last bits of a trellis code
follow from the rows above (see `arbllm.binarize.code`), which are words at a fixed distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.code import MEMORY, ROWS_APART
from arbllm.format.layout import Layout, Place, Segment

WORD = 32
"""Columns of a word."""
ROWS_BEFORE = ROWS_APART * MEMORY
"""Words of zeros before first signs: the rows above the first."""
ROWS_TOGETHER = 16
"""Rows are filled up to a multiple of this."""
CHUNK = 8
"""Words that tensor cores take together, whose inputs are scaled together."""
UNIT = 8
"""Places of words are counted in so many."""
SINGLES_TOGETHER = 16
"""Columns with a scale for each weight that a program takes."""
SINGLE = Segment(1, 1, 1)
"""A column with a scale for each weight; arb-rcx has a few."""


class Kind(NamedTuple):
    """What columns that lie together have in common: fields of their segments.

    Attributes:
        groups: zones of a row.
        terms: stored signs of a weight.
        trellis: whether signs are those of a trellis code.
    """

    groups: int
    terms: int
    trellis: bool

    @property
    def planes(self) -> int:
        """Stored bits of a weight: signs, then the low and the high bit of its group."""
        return self.terms if self.trellis else self.terms + self.groups.bit_length() - 1

    def slots(self, means: bool) -> int:
        """Numbers that inputs are multiplied by, group by group and term by term, then a mean for each group."""
        return 1 if self.trellis else self.groups * (self.terms + means)


class Band(NamedTuple):
    """The columns of a segment.

    Attributes:
        kind: of the segment.
        start: where the words that hold them begin, in units of UNIT words.
        words: of a row.
        low: column of the first word that is the segment's first.
        high: its end, from the first word's first column as well; where no other segment follows in the stream, the
            end of the last word, so that what fills it up is of a band as well.
        column: where the first word's columns begin in `Prepared.order`.
        factor: where they begin in `Prepared.factors`, those of the first slot.
        stride: from there to those of the next.
        scale: row of `Prepared.row_scales` of the first slot.
        mean: row of `Prepared.row_means` of the first group.
    """

    kind: Kind
    start: int
    words: int
    low: int
    high: int
    column: int
    factor: int
    stride: int
    scale: int
    mean: int

    @property
    def chunks(self) -> int:
        """How many chunks it has."""
        return -(-self.words // CHUNK)


class Unit(NamedTuple):
    """Work for one program: a row of what `Plan` makes. Fields without a word here are those of a `Band`.

    Attributes:
        kind: place in `Plan.kinds`; `len(kinds)` for single columns.
        start: where the words begin, in units of UNIT words; of single columns, and of chunks in `Plan.spans`, the
            first.
        length: words of a row, single columns, or chunks.
        low: column of the first word that is the first, 0 unless another segment has those before.
        high: the end of the columns, from the first word's first as well.
    """

    kind: int
    start: int
    length: int
    low: int
    high: int
    column: int
    factor: int
    stride: int
    scale: int
    mean: int


@dataclass(frozen=True, eq=False)  # there is one for each layout
class Plan:
    """What of a prepared matrix follows from its layout alone; `plan_of` makes it.

    Attributes:
        layout: of the matrix as it is stored.
        streams: segments that lie together, all of a kind.
        singles: columns with a scale for each weight.
    """

    layout: Layout
    streams: tuple[tuple[Place, ...], ...]
    singles: tuple[Place, ...]
    _kept: dict[tuple[str, int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The segments of all streams."""
        return tuple(_bands(self))

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of columns that there are."""
        return tuple(dict.fromkeys(band.kind for band in self.bands))

    @cached_property
    def height(self) -> int:
        """Words from one plane of a word's bits to the next: rows, filled up."""
        return -(-self.layout.rows // ROWS_TOGETHER) * ROWS_TOGETHER

    @cached_property
    def single_start(self) -> int:
        """Where single columns begin in `Prepared.order`."""
        return sum(width_of(stream) for stream in self.streams)

    @cached_property
    def single_factor(self) -> int:
        """Where single columns begin in `Prepared.factors`."""
        return sum(width_of(stream) * self.slots(kind_of(stream[0])) for stream in self.streams)

    @cached_property
    def most_slots(self) -> int:
        """Slots of the kind that has the most."""
        return max((self.slots(kind) for kind in self.kinds), default=1)

    @cached_property
    def all_trellis(self) -> bool:
        """Whether all columns in words, of which there are some, have a trellis: tensor cores multiply no others."""
        return bool(self.kinds) and all(kind.trellis for kind in self.kinds)

    @cached_property
    def longest(self) -> int:
        """Words of the longest band."""
        return max((band.words for band in self.bands), default=1)

    @cached_property
    def chunks(self) -> int:
        """Chunks of all bands; each band begins with one."""
        return sum(band.chunks for band in self.bands)

    def slots(self, kind: Kind) -> int:
        """See `Kind.slots`."""
        return kind.slots(self.layout.row_means)

    def size(self, kind: Kind) -> int:
        """From a word of a row to the next, in units of UNIT words."""
        return (kind.planes * self.height + ROWS_BEFORE) // UNIT

    def units(self, most: int, device: torch.device) -> Tensor:
        """Work for one program each: words of one band, at most so many, or single columns.

        Returns:
            int32 (units, fields of `Unit`).
        """
        return self._table("units", most, device, lambda: [*self._divided(most), *self._alone()])

    def chunk_table(self, device: torch.device) -> Tensor:
        """Each chunk: int32 (chunks, fields of `Unit`)."""
        return self._table("chunks", 1, device, lambda: self._divided(1, CHUNK))

    def spans(self, most: int, device: torch.device) -> Tensor:
        """Work for one program each: chunks of one kind, at most so many, or single columns.

        Returns:
            int32 (units, fields of `Unit`), chunks [start, start + length).
        """
        return self._table("spans", most, device, lambda: [*self._spanned(most), *self._alone()])

    def _table(self, name: str, most: int, device: torch.device, make: Callable[[], Iterable[Unit]]) -> Tensor:
        """Made once: a CUDA graph may not record that it is."""
        key = name, most, device
        if key not in self._kept:
            self._kept[key] = torch.tensor(list(make()), dtype=torch.int32).to(device)
        return self._kept[key]

    def _divided(self, most: int, step: int = 1) -> Iterator[Unit]:
        for band in self.bands:
            for first, last in evenly(-(-band.words // step), most):
                word, end = step * first, min(step * last, band.words)
                yield Unit(
                    kind=self.kinds.index(band.kind),
                    start=band.start + word * self.size(band.kind),
                    length=end - word,
                    low=max(band.low - WORD * word, 0),
                    high=min(band.high, WORD * end) - WORD * word,
                    column=band.column + WORD * word,
                    factor=band.factor + WORD * word,
                    stride=band.stride,
                    scale=band.scale,
                    mean=band.mean,
                )

    def _spanned(self, most: int) -> Iterator[Unit]:
        start = 0
        for number, kind in enumerate(self.kinds):
            chunks = sum(band.chunks for band in self.bands if band.kind == kind)
            for first, last in evenly(chunks, most):
                yield Unit(number, start + first, last - first, *[0] * 7)
            start += chunks

    def _alone(self) -> Iterator[Unit]:
        for first, last in evenly(len(self.singles), SINGLES_TOGETHER):
            column, factor = self.single_start + first, self.single_factor + first
            yield Unit(len(self.kinds), first, last - first, 0, 0, column, factor, 0, 0, 0)


def evenly(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Spans of at most so many that differ by one at most."""
    parts = -(-count // most)
    yield from ((part * count // parts, (part + 1) * count // parts) for part in range(parts))


def kind_of(place: Place) -> Kind:
    """The kind of a segment."""
    return Kind(place.segment.groups, place.segment.terms, place.segment.trellis)


def width_of(stream: Sequence[Place]) -> int:
    """Columns of segments that lie together, filled up to whole words."""
    return -(-sum(place.segment.width for place in stream) // WORD) * WORD


@cache
def plan_of(layout: Layout) -> Plan:
    """Where a matrix of this layout will have what."""
    alone = SINGLE if not layout.row_means else None
    places = sorted((place for place in layout.places if place.segment != alone), key=kind_of)
    together = groupby(places, lambda place: (kind_of(place), place.column if place.segment.trellis else 0))
    streams = tuple(tuple(stream) for _, stream in together)
    return Plan(layout, streams, tuple(place for place in layout.places if place.segment == alone))


def _bands(plan: Plan) -> Iterator[Band]:
    start = column = factor = scale = mean = 0
    for stream in plan.streams:
        kind, width, inside = kind_of(stream[0]), width_of(stream), 0
        for place in stream:
            word, low = divmod(inside, WORD)
            inside += place.segment.width
            end = width if place is stream[-1] else inside
            yield Band(
                kind=kind,
                start=start + word * plan.size(kind),
                words=-(-end // WORD) - word,
                low=low,
                high=end - WORD * word,
                column=column + WORD * word,
                factor=factor + WORD * word,
                stride=width,
                scale=scale,
                mean=mean,
            )
            scale += place.segment.slots
            mean += kind.groups
        start += width // WORD * plan.size(kind)
        column += width
        factor += width * plan.slots(kind)
