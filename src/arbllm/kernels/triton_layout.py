"""How a packed matrix lies in GPU memory, so that its bits are tensor core operands after a single operation.

Segments with a trellis count as plain ones (see `expand`), whose bits a kernel puts together from those that are stored
and those of rows above. Columns of one kind (as many groups and signs, from the same bits) lie together, in pieces of
CHUNK = 64. In each piece a word of 16 bits holds 4 columns of each of 4 rows: bit ``4 q + b`` of word w is column
``16 b + w`` of the piece in row ``q * quarter + i``, quarter = ceil(rows / 4) or more. A word masked to one of its bits
0 to 11 is a power of two as float16: 2^(bit - 24), since up to bit 9 it is a subnormal number and bits 10 and 11 begin
the exponent. So the product of a bit plane with activations needs one mask for two weights and no conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.code import MEMORY, ROWS_APART
from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.trellis import FURTHER_SIGNS
from arbllm.kernels.expand import PARTS, Expanded, Piece, expanded

CHUNK = 64
WORDS = 16
"""Words of a chunk in one row of words, which stands for ROWS_OF_A_WORD rows."""
ROWS_OF_A_WORD = 4
SINGLES = 16
"""Single columns that are multiplied together."""
LONGEST_RUN = 16
"""Chunks that a run touches at most."""
PIECE = 32 * CHUNK
"""Columns that are repacked at a time."""


class Kind(NamedTuple):
    """What columns that lie together have in common.

    Attributes:
        groups: of their plain segments.
        terms: of their plain segments.
        part: of `expand.PARTS`; 0 if they are stored as they are.
    """

    groups: int
    terms: int
    part: int

    @property
    def planes(self) -> int:
        """Stored bits of a weight."""
        return PARTS[self.part].terms if self.part else self.terms + self.groups.bit_length() - 1


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
        step: of `Prepared.steps` that is of group 0, term 0.
        row_mean: row of `Prepared.row_means` that holds group 0.
        factor: place of the first chunk's first column in the column scales of group 0, term 0; columns before `low`
            are another segment's.
        width: of the segment: from the column scales of one slot to those of the next.
        tile: tiles of activations before it, see `Prepared.tiles`.
        stop: `high`, or in the last run of a kind the end of its last chunk, padding included.
        part: of the kind.
        row_scale: row of `Prepared.row_scales` that holds group 0, term 0.
        row_step: from there to the row of the next slot; 0 if there is one for all.
    """

    groups: int
    terms: int
    words: int
    chunks: int
    column: int
    low: int
    high: int
    step: int
    row_mean: int
    factor: int
    width: int
    tile: int
    stop: int
    part: int
    row_scale: int
    row_step: int

    @property
    def kind(self) -> Kind:
        """Of its columns."""
        return Kind(self.groups, self.terms, self.part)


@dataclass(frozen=True)
class Prepared:
    """A packed matrix as the Triton kernels read it.

    Attributes:
        layout: of the matrix as it is stored; everything else is of plain segments.
        kinds: of the columns that are in `words`.
        runs: all columns in `words`.
        words: int16, flat: for each kind (chunks, planes, quarter, WORDS); planes are first signs, second signs where
            there are two, low and high bits of the group number where there are groups; with a trellis, all stored
            signs. The two parts of levels of four stored signs share their words.
        order: int32, natural column of each column in `words`, then of each in `singles`; both padded, with 0. With a
            trellis it may hold a column twice.
        row_scales: uint8 codes or float16, (slots, rows), up to the last slot that a run uses; float32 with a trellis
            and no codes.
        steps: float16, (slots), what codes are multiplied by; empty without codes, float32 with a trellis.
        column_scales: as stored, flat; empty without any.
        row_means: float16 (slots, rows); empty without any.
        singles: segments of one column, one group and one sign: int16 (k, rows) signed codes, or signed scales, of the
            dtype of row scales.
        single_columns: int32 (3, k): natural column, scale slot, place in the column scales.
        run_table: int32 (runs, fields of `Run`).
    """

    layout: Layout
    kinds: tuple[Kind, ...]
    runs: tuple[Run, ...]
    words: Tensor
    order: Tensor
    row_scales: Tensor
    steps: Tensor
    column_scales: Tensor
    row_means: Tensor
    singles: Tensor
    single_columns: Tensor
    run_table: Tensor
    _units: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def quarter(self) -> int:
        """Rows of words."""
        return _quarter(self.layout)

    @property
    def tiles(self) -> int:
        """Tiles of CHUNK columns of activations over all runs, each scaled for one use (see `tiles_of`)."""
        return sum(run.chunks * tiles_of(self.layout, run.kind) for run in self.runs)

    @property
    def single_start(self) -> int:
        """Where single columns begin in `order`."""
        return len(self.order) - -(-len(self.singles) // SINGLES) * SINGLES

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those shared with the stored form included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the class."""
        return [
            *(self.words, self.order, self.row_scales, self.steps, self.column_scales, self.row_means),
            *(self.singles, self.single_columns, self.run_table),
        ]

    def units(self, chunks: int) -> Tensor:
        """Work for one program each: runs of one kind that together have about so many chunks.

        Returns:
            int32 (units, 3): kind and runs [first, last); of kind `len(kinds)`, single columns.
        """
        if chunks not in self._units:
            self._units[chunks] = torch.tensor(self._divided(chunks), dtype=torch.int32).to(self.words.device)
        return self._units[chunks]

    def _divided(self, chunks: int) -> list[tuple[int, int, int]]:
        found = [(number, *span) for number, kind in enumerate(self.kinds) for span in self._spans_of(kind, chunks)]
        singles, most = len(self.singles), chunks * SINGLES
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


def prepare(matrix: BinaryMatrix) -> Prepared:
    """Repack a matrix for the GPU; without a trellis, its column scales and steps are shared.

    Args:
        matrix: on any device; the result is on the same.
    """
    layout, device, plain = matrix.layout, matrix.signs.device, expanded(matrix)
    single, regular = _divide(layout, plain.pieces)
    natural = torch.arange(layout.columns, device=device) if plain.order is None else plain.order
    words, columns, runs = [torch.empty(0, dtype=torch.int16, device=device)], [], []
    starts: dict[Kind, int] = {}
    column = end = tile = 0
    for kind, members in groupby(sorted(regular, key=_kind), _kind):
        pieces = list(members)
        chunks = -(-sum(piece.segment.width for piece in pieces) // CHUNK)
        size = kind.planes * _quarter(layout) * WORDS
        starts[kind] = next((start for other, start in starts.items() if _shares_words(kind, other)), end)
        if starts[kind] == end:
            words += _repack(matrix, kind, pieces, chunks)
            end += chunks * size
        columns.append(_padded(torch.cat([natural[_span(piece)] for piece in pieces]), chunks * CHUNK))
        for run in _runs(pieces, starts[kind], column, size):
            runs.append(run._replace(tile=tile))
            tile += run.chunks * tiles_of(layout, kind)
        column += chunks * CHUNK
    singles, single_columns = _singles(matrix, plain, single, natural)
    columns.append(_padded(single_columns[0], -(-len(singles) // SINGLES) * SINGLES))
    empty = matrix.row_scales.new_empty(0)
    return Prepared(
        layout=layout,
        kinds=tuple(starts),
        runs=tuple(runs),
        words=torch.cat(words),
        order=torch.cat(columns).int(),
        row_scales=plain.row_scales[:, : _slots(regular)].T.contiguous(),
        steps=empty.half() if plain.scale_steps is None else plain.scale_steps,
        column_scales=empty if plain.column_scales is None else plain.column_scales,
        row_means=empty.half() if matrix.row_means is None else matrix.row_means.T.contiguous(),
        singles=singles,
        single_columns=single_columns,
        run_table=torch.tensor(runs, dtype=torch.int32).reshape(-1, len(Run._fields)).to(device),
    )


def _quarter(layout: Layout) -> int:
    """Rows of words: with a trellis so many that a code depends on a word's same row or the one before it alone."""
    least = ROWS_APART * MEMORY if layout.has_trellis else 0
    return max(-(-layout.rows // ROWS_OF_A_WORD), least)


def _divide(layout: Layout, pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Segments of a single column whose scale alone makes a weight, and all others."""
    alone = () if layout.row_means else (Segment(1, 1, 1),)
    single = [piece for piece in pieces if piece.segment in alone]
    return single, [piece for piece in pieces if piece.segment not in alone]


def _slots(pieces: Sequence[Piece]) -> int:
    """Row scale slots up to the last of these segments; single columns, which keep their own scales, come last."""
    return max((piece.row + piece.row_step * (piece.segment.slots - 1) + 1 for piece in pieces), default=0)


def _kind(piece: Piece) -> Kind:
    return Kind(piece.segment.groups, piece.segment.terms, piece.part)


def _shares_words(kind: Kind, other: Kind) -> bool:
    """Whether two kinds are parts of the same levels."""
    return bool(kind.part and other.part) and PARTS[kind.part].terms == PARTS[other.part].terms


def _span(piece: Piece) -> slice:
    return slice(piece.place.column, piece.place.column + piece.segment.width)


def _runs(pieces: Sequence[Piece], word: int, column: int, chunk_words: int) -> Iterator[Run]:
    """Runs of segments that lie one after the other from `column` and `word` on; each begins a chunk or a segment."""
    start = 0
    for piece in pieces:
        place, kind = piece.place, _kind(piece)
        end = start + place.segment.width
        for chunk in range(start // CHUNK, -(-end // CHUNK), LONGEST_RUN):
            last = min(chunk + LONGEST_RUN, -(-end // CHUNK))
            high = min(end, last * CHUNK) - chunk * CHUNK
            yield Run(
                groups=kind.groups,
                terms=kind.terms,
                words=(word + chunk * chunk_words) // WORDS,
                chunks=last - chunk,
                column=column + chunk * CHUNK,
                low=max(start - chunk * CHUNK, 0),
                high=high,
                step=place.row_scale,
                row_mean=place.row_mean,
                factor=place.column_scale + chunk * CHUNK - start,
                width=place.segment.width,
                tile=0,
                stop=(last - chunk) * CHUNK if piece is pieces[-1] and end <= last * CHUNK else high,
                part=kind.part,
                row_scale=piece.row,
                row_step=piece.row_step,
            )
        start = end


def _repack(matrix: BinaryMatrix, kind: Kind, pieces: Sequence[Piece], chunks: int) -> Iterator[Tensor]:
    """The words of one kind, a few chunks at a time, flat."""
    signs = list(zip(("signs", *FURTHER_SIGNS), ("column", "second", "third", "fourth"), strict=True))
    groups = [("group_bitmap", "low"), ("group_bitmap_high", "high")]
    sources = signs[: kind.planes] if kind.part else signs[: kind.terms] + groups[: kind.groups.bit_length() - 1]
    device = matrix.signs.device
    where = [
        torch.cat([torch.arange(p.segment.width, device=device) + getattr(p.source, field) for p in pieces])
        for _, field in sources
    ]
    for start in range(0, chunks * CHUNK, PIECE):
        size = min(PIECE, chunks * CHUNK - start)
        planes = [
            _words(_bits(getattr(matrix, name), index[start : start + size]), size // CHUNK, _quarter(matrix.layout))
            for (name, _), index in zip(sources, where, strict=True)
        ]
        yield torch.stack(planes, 1).flatten()


def _bits(packed: Tensor, columns: Tensor) -> Tensor:
    """Some columns of packed rows, int32 (n, k) of 0 and 1."""
    return packed[:, columns // 8].int() >> (columns % 8).int() & 1


def _words(bits: Tensor, chunks: int, quarter: int) -> Tensor:
    """Words (chunks, quarter, WORDS), int16, from bits (rows, columns)."""
    bits = _padded(_padded(bits.T, chunks * CHUNK).T, ROWS_OF_A_WORD * quarter)
    places = bits.view(ROWS_OF_A_WORD, quarter, chunks, CHUNK // WORDS, WORDS)
    shifts = torch.arange(16, dtype=torch.int32, device=bits.device).view(ROWS_OF_A_WORD, 1, 1, CHUNK // WORDS, 1)
    return (places << shifts).sum((0, 3), dtype=torch.int32).to(torch.int16).transpose(0, 1)


def _padded(values: Tensor, length: int) -> Tensor:
    """Values with their first dimension filled up by zeros."""
    missing = values.new_zeros(length - len(values), *values.shape[1:])
    return torch.cat([values, missing]) if len(missing) else values


def _singles(matrix: BinaryMatrix, plain: Expanded, pieces: Sequence[Piece], natural: Tensor) -> tuple[Tensor, Tensor]:
    device = natural.device
    columns, slots, factors = (
        torch.tensor([getattr(piece.place, field) for piece in pieces], dtype=torch.int64, device=device)
        for field in ("column", "row_scale", "column_scale")
    )
    stored = torch.tensor([piece.source.column for piece in pieces], dtype=torch.int64, device=device)
    scales = plain.row_scales[:, [piece.row for piece in pieces]]
    signs = 2 * _bits(matrix.signs, stored) - 1
    values = signs.to(torch.int16) * scales if matrix.layout.scale_bits == 8 else signs.half() * scales
    return values.T.contiguous(), torch.stack([natural[columns], slots, factors]).int()
