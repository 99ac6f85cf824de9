"""Where a matrix that is prepared for a GPU (`triton_layout.Prepared`) has what: it follows from the layout alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.format.layout import Layout, Place, Segment

CHUNK = 64
WORDS = 16
"""Words of a chunk in one row of words, which stands for ROWS_OF_A_WORD rows."""
ROWS_OF_A_WORD = 4
SINGLES = 16
"""Single columns that are multiplied together."""
LONGEST_RUN = 16
"""Chunks that a run touches at most."""


class Kind(NamedTuple):
    """What columns that lie together have in common.

    Attributes:
        groups: of their segments.
        terms: of their segments.
    """

    groups: int
    terms: int

    @property
    def planes(self) -> int:
        """Stored bits of a weight."""
        return self.terms + self.groups.bit_length() - 1


class Run(NamedTuple):
    """Columns of one segment that a program goes through in one loop: a row of `Prepared.run_table`.

    Attributes:
        groups: of the segment.
        terms: of the segment.
        words: first word of its first chunk, over WORDS: a compiler then knows that loads are aligned.
        chunks: how many chunks it touches.
        column: where its first chunk begins in `Prepared.order`.
        low: its first column, from there.
        high: its end, from there.
        slot: row of `Prepared.row_scales`, and place in `Prepared.steps`, of group 0, term 0.
        row_mean: row of `Prepared.row_means` that holds group 0.
        factor: place of the first chunk's first column in the column scales of group 0, term 0; columns before `low`
            are another segment's.
        width: of the segment: from the column scales of one slot to those of the next.
        tile: tiles of activations before it, see `Plan.tiles`.
        stop: `high`, or in the last run of a kind the end of its last chunk, padding included.
    """

    groups: int
    terms: int
    words: int
    chunks: int
    column: int
    low: int
    high: int
    slot: int
    row_mean: int
    factor: int
    width: int
    tile: int
    stop: int

    @property
    def kind(self) -> Kind:
        """Of its columns."""
        return Kind(self.groups, self.terms)


class Family(NamedTuple):
    """Segments of one kind, which lie together.

    Attributes:
        kind: of them all.
        places: of the segments, in their order.
        chunks: of columns that they fill.
        column: where they begin in `Prepared.order`.
        words: where they begin in `Prepared.words`.
    """

    kind: Kind
    places: tuple[Place, ...]
    chunks: int
    column: int
    words: int


@dataclass(frozen=True)
class Plan:
    """What of a prepared matrix follows from its layout alone; `plan_of` makes it.

    Attributes:
        layout: of the matrix; none of its segments has a trellis.
        families: of all columns that are in words.
        alone: segments that are in `Prepared.singles`.
        runs: all columns that are in words.
    """

    layout: Layout
    families: tuple[Family, ...]
    alone: tuple[Place, ...]
    runs: tuple[Run, ...]
    _units: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Of the columns that are in words."""
        return tuple(family.kind for family in self.families)

    @cached_property
    def quarter(self) -> int:
        """Rows of words."""
        return rows_of_words(self.layout)

    @cached_property
    def tiles(self) -> int:
        """Tiles of CHUNK columns of activations over all runs, each scaled for one use (see `tiles_of`)."""
        return sum(run.chunks * tiles_of(self.layout, run.kind) for run in self.runs)

    @cached_property
    def single_start(self) -> int:
        """Where single columns begin in `Prepared.order`."""
        return CHUNK * sum(family.chunks for family in self.families)

    @cached_property
    def columns(self) -> int:
        """The length of `Prepared.order`."""
        return self.single_start + -(-len(self.alone) // SINGLES) * SINGLES

    def units(self, chunks: int, device: torch.device) -> Tensor:
        """Work for one program each: runs of one kind that together have about so many chunks.

        Returns:
            int32 (units, 3): kind and runs [first, last); of kind `len(kinds)`, single columns.
        """
        if (chunks, device) not in self._units:
            self._units[chunks, device] = torch.tensor(self._divided(chunks), dtype=torch.int32).to(device)
        return self._units[chunks, device]

    def _divided(self, chunks: int) -> list[tuple[int, int, int]]:
        found = [(number, *span) for number, kind in enumerate(self.kinds) for span in self._spans_of(kind, chunks)]
        singles, most = len(self.alone), chunks * SINGLES
        return found + [(len(self.kinds), first, min(first + most, singles)) for first in range(0, singles, most)]

    def _spans_of(self, kind: Kind, chunks: int) -> Iterator[tuple[int, int]]:
        first = size = 0
        numbers = [number for number, run in enumerate(self.runs) if run.kind == kind]
        for place, number in enumerate(numbers):
            first = number if not size else first
            size += self.runs[number].chunks
            following = self.runs[numbers[place + 1]].chunks if place + 1 < len(numbers) else chunks
            if size + following > chunks:
                yield first, number + 1
                size = 0


def tiles_of(layout: Layout, kind: Kind) -> int:
    """How many ways the activations of a run are scaled: by each term's column scales, and not at all for row means."""
    return kind.terms + layout.row_means if layout.column_scaled else 1


@cache
def plan_of(layout: Layout) -> Plan:
    """Where a matrix of this layout, without a trellis, will have what."""
    alone = () if layout.row_means else (Segment(1, 1, 1),)  # a single column whose scale alone makes a weight
    families = tuple(_families(layout, [place for place in layout.places if place.segment not in alone]))
    runs: list[Run] = []
    tile = 0
    for family in families:
        for run in _runs(family, _chunk_words(layout, family.kind)):
            runs.append(run._replace(tile=tile))
            tile += run.chunks * tiles_of(layout, family.kind)
    return Plan(layout, families, tuple(place for place in layout.places if place.segment in alone), tuple(runs))


def _families(layout: Layout, places: Sequence[Place]) -> Iterator[Family]:
    """Segments by their kinds, and where each kind lies."""
    column = words = 0
    for kind, members in groupby(sorted(places, key=_kind), _kind):
        together = tuple(members)
        chunks = -(-sum(place.segment.width for place in together) // CHUNK)
        yield Family(kind, together, chunks, column, words)
        words += chunks * _chunk_words(layout, kind)
        column += chunks * CHUNK


def _chunk_words(layout: Layout, kind: Kind) -> int:
    """Words of a chunk: its planes."""
    return kind.planes * rows_of_words(layout) * WORDS


def rows_of_words(layout: Layout) -> int:
    """Rows of words."""
    return -(-layout.rows // ROWS_OF_A_WORD)


def _kind(place: Place) -> Kind:
    return Kind(place.segment.groups, place.segment.terms)


def _runs(family: Family, chunk_words: int) -> Iterator[Run]:
    """Runs of its segments, without their tiles; each begins a chunk or a segment."""
    start = 0
    for place in family.places:
        end = start + place.segment.width
        for chunk in range(start // CHUNK, -(-end // CHUNK), LONGEST_RUN):
            last = min(chunk + LONGEST_RUN, -(-end // CHUNK))
            high = min(end, last * CHUNK) - chunk * CHUNK
            yield Run(
                groups=family.kind.groups,
                terms=family.kind.terms,
                words=(family.words + chunk * chunk_words) // WORDS,
                chunks=last - chunk,
                column=family.column + chunk * CHUNK,
                low=max(start - chunk * CHUNK, 0),
                high=high,
                slot=place.row_scale,
                row_mean=place.row_mean,
                factor=place.column_scale + chunk * CHUNK - start,
                width=place.segment.width,
                tile=0,
                stop=(last - chunk) * CHUNK if place is family.places[-1] and end <= last * CHUNK else high,
            )
        start = end
