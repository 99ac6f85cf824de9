"""How a matrix with a trellis code lies in GPU memory: a word of 32 bits holds 32 columns of one row.

Segments of as many stored signs lie together, and each is filled up to whole words. The words of all rows follow each
other, first signs before the others, so that the rows above, from which a code's last bits follow (see
`arbllm.binarize.code`), are words at a fixed distance. Column ``4 q + j`` of a word, q = 2 b + h, is its bit
``16 h + 4 j + b``: bit b of all its half-bytes makes the numbers of eight levels, of which a single instruction looks
up four, those of four columns that follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.code import COEFFICIENTS, MEMORY, ROWS_APART, level_values
from arbllm.binarize.scales import shares
from arbllm.format.layout import Layout, Place, Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.trellis import FURTHER_SIGNS
from arbllm.kernels.prepared import PreparedTensors

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
TURNED = (0x00FF00FF, 0x0000FFFF, -1)
"""Of four half-bytes' bit 0, 1 and 2, what a byte permutation makes all ones in the bytes where it is not set."""
LARGEST_LEVEL = {1: 113.5, 2: 117.45, 3: 94.35, 4: 113.15}
"""By which number the largest level is told where levels are the odd multiples of 1/2 up to 127.5: the one by which
they are nearest to such multiples. They are off by 0.001, 0.11, 0.29 and 0.37 % (root mean squares, levels alike)."""


class Band(NamedTuple):
    """The words of a segment.

    Attributes:
        terms: stored signs of a weight.
        start: where they begin, in units of UNIT words.
        words: of a row.
        column: where their columns begin in `PreparedTrellis.order`.
    """

    terms: int
    start: int
    words: int
    column: int

    @property
    def chunks(self) -> int:
        """How many chunks it has."""
        return -(-self.words // CHUNK)


class Unit(NamedTuple):
    """Work for one program: a row of what `TrellisPlan.units` makes.

    Attributes:
        kind: place of the words' stored signs in `TrellisPlan.kinds`; `len(kinds)` for single columns.
        start: where the words begin, in units of UNIT words; of single columns, the first.
        length: words of a row, or single columns.
        column: where the columns begin in `PreparedTrellis.order`.
        segment: row of `PreparedTrellis.row_scales`.
    """

    kind: int
    start: int
    length: int
    column: int
    segment: int


@dataclass(frozen=True, eq=False)  # there is one for each layout
class TrellisPlan:
    """What of a prepared matrix follows from its layout alone; `plan_of` makes it.

    Attributes:
        layout: of the matrix as it is stored.
        coded: segments with a trellis, by their stored signs.
        singles: columns with a scale for each weight.
        others: all other segments.
    """

    layout: Layout
    coded: tuple[Place, ...]
    singles: tuple[Place, ...]
    others: tuple[Place, ...]
    _units: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The columns of `coded`."""
        return tuple(_bands(self))

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """Numbers of stored signs that there are."""
        return tuple(sorted({band.terms for band in self.bands}))

    @cached_property
    def height(self) -> int:
        """Words from one plane of a word's bits to the next: rows, filled up."""
        return -(-self.layout.rows // ROWS_TOGETHER) * ROWS_TOGETHER

    @cached_property
    def single_start(self) -> int:
        """Where single columns begin in `PreparedTrellis.order`."""
        return WORD * sum(band.words for band in self.bands)

    @cached_property
    def chunks(self) -> int:
        """Chunks of all bands; each band begins with one."""
        return sum(band.chunks for band in self.bands)

    def units(self, most: int, device: torch.device) -> Tensor:
        """Work for one program each: words of one band, at most so many, or single columns.

        Returns:
            int32 (units, fields of `Unit`).
        """
        return self._kept(most, device, lambda: [*self._divided(most), *self._alone()])

    def chunk_table(self, device: torch.device) -> Tensor:
        """Each chunk: int32 (chunks, fields of `Unit`)."""
        return self._kept(0, device, lambda: self._divided(1, CHUNK))

    def spans(self, most: int, device: torch.device) -> Tensor:
        """Work for one program each: chunks of as many stored signs, at most so many, or single columns.

        Returns:
            int32 (units, fields of `Unit`), chunks [start, start + length).
        """
        return self._kept(-most, device, lambda: [*self._spanned(most), *self._alone()])

    def _kept(self, number: int, device: torch.device, make: Callable[[], Iterable[Unit]]) -> Tensor:
        if (number, device) not in self._units:
            self._units[number, device] = torch.tensor(list(make()), dtype=torch.int32).to(device)
        return self._units[number, device]

    def _divided(self, most: int, step: int = 1) -> Iterator[Unit]:
        for segment, band in enumerate(self.bands):
            size = (band.terms * self.height + ROWS_BEFORE) // UNIT
            for first, last in _evenly(-(-band.words // step), most):
                word, end = step * first, min(step * last, band.words)
                place = band.start + word * size, end - word, band.column + word * WORD
                yield Unit(self.kinds.index(band.terms), *place, segment)

    def _spanned(self, most: int) -> Iterator[Unit]:
        start = 0
        for kind, terms in enumerate(self.kinds):
            chunks = sum(band.chunks for band in self.bands if band.terms == terms)
            for first, last in _evenly(chunks, most):
                yield Unit(kind, start + first, last - first, 0, 0)
            start += chunks

    def _alone(self) -> Iterator[Unit]:
        for first, last in _evenly(len(self.singles), SINGLES_TOGETHER):
            yield Unit(len(self.kinds), first, last - first, self.single_start + first, 0)


def _evenly(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Spans of at most so many that differ by one at most."""
    parts = -(-count // most)
    yield from ((part * count // parts, (part + 1) * count // parts) for part in range(parts))


@cache
def plan_of(layout: Layout) -> TrellisPlan:
    """Where a matrix of this layout will have what."""
    coded = sorted((place for place in layout.places if place.segment.trellis), key=lambda place: place.segment.terms)
    plain = [place for place in layout.places if not place.segment.trellis]
    alone = SINGLE if not layout.row_means else None
    return TrellisPlan(
        layout,
        tuple(coded),
        tuple(place for place in plain if place.segment == alone),
        tuple(place for place in plain if place.segment != alone),
    )


def _bands(plan: TrellisPlan) -> Iterator[Band]:
    start = column = 0
    for place in plan.coded:
        terms = place.segment.terms
        band = Band(terms, start // UNIT, -(-place.segment.width // WORD), column)
        yield band
        start += band.words * (terms * plan.height + ROWS_BEFORE)
        column += band.words * WORD


@dataclass(frozen=True)
class PreparedTrellis(PreparedTensors):
    """A packed matrix with a trellis as the Triton kernels read it.

    Attributes:
        plan: where what is.
        words: int32, flat: for each word of columns of each band, ROWS_BEFORE zeros, then (terms, height): first signs,
            then the further ones.
        order: int32, the natural column of each column, first those in words, then `singles`; 0 of those that fill
            words up, or `singles` up to a multiple of SINGLES_TOGETHER.
        factors: float32, like `order`: what a weight is multiplied by besides its row scale; 0 of those that fill up.
        row_scales: uint8 codes or float16 (bands, height).
        levels: int32 (20): of each number of stored signs the four words of bytes that `triton_trellis_levels` looks
            levels up in, then its other constants.
        exact_levels: float32 (4, 32): of each number of stored signs all levels.
        singles: int16 (k, height), signed codes of columns with a scale for each weight, or float16, signed scales.
        other_columns: int64, natural columns of segments of other kinds, which no method mixes with a trellis.
        others: float32 (rows, columns), the weights of these.
    """

    plan: TrellisPlan
    words: Tensor
    order: Tensor
    factors: Tensor
    row_scales: Tensor
    levels: Tensor
    exact_levels: Tensor
    singles: Tensor
    other_columns: Tensor
    others: Tensor


def prepare(matrix: BinaryMatrix) -> PreparedTrellis:
    """Repack a matrix with a trellis for the GPU.

    Args:
        matrix: on any device; the result is on the same.
    """
    layout, device, plan = matrix.layout, matrix.signs.device, plan_of(matrix.layout)
    stored = matrix.column_order()
    natural = torch.arange(layout.columns, device=device) if stored is None else stored
    others = _columns(plan.others, device)
    singles = _filled(natural[_columns(plan.singles, device)], SINGLES_TOGETHER)
    scales = [natural.new_empty(0).float(), *(_factors(matrix, place) for place in plan.singles)]
    single_factors = _filled(torch.cat(scales), SINGLES_TOGETHER)
    words = [torch.empty(0, dtype=torch.int32, device=device), *(_words(matrix, place) for place in plan.coded)]
    return PreparedTrellis(
        plan=plan,
        words=torch.cat(words),
        order=torch.cat([*(_filled(natural[_columns([place], device)]) for place in plan.coded), singles]).int(),
        factors=torch.cat([*(_filled(_factors(matrix, place)) for place in plan.coded), single_factors]),
        row_scales=_rows(matrix.row_scales[:, [place.row_scale for place in plan.coded]], plan),
        levels=torch.tensor(_constants(), dtype=torch.int32).to(device),
        exact_levels=torch.tensor([_levels(terms) for terms in sorted(COEFFICIENTS)]).to(device),
        singles=_singles(matrix, plan),
        other_columns=natural[others],
        others=matrix.dequantize()[:, natural[others]] if len(others) else natural.new_empty(layout.rows, 0).float(),
    )


def _columns(places: tuple[Place, ...] | list[Place], device: torch.device) -> Tensor:
    """Stored columns of some segments, int64."""
    spans = [torch.arange(place.column, place.column + place.segment.width) for place in places]
    return torch.cat([torch.empty(0, dtype=torch.int64), *spans]).to(device)


def _filled(values: Tensor, multiple: int = WORD) -> Tensor:
    """Values filled up with zeros, to whole words or another multiple."""
    return torch.cat([values, values.new_zeros(-len(values) % multiple)])


def _factors(matrix: BinaryMatrix, place: Place) -> Tensor:
    """Column scales of a segment with one slot, times the step that codes are in: float32 (width)."""
    assert matrix.column_scales is not None, "a trellis has column scales"
    scales = matrix.column_scales[place.column_scale : place.column_scale + place.segment.width]
    if matrix.scale_steps is None:
        return scales.float()
    return shares(scales) * matrix.scale_steps[place.row_scale].float()


def _rows(values: Tensor, plan: TrellisPlan) -> Tensor:
    """Values (rows, k) as (k, height)."""
    return torch.cat([values, values.new_zeros(plan.height - len(values), values.shape[1])]).T.contiguous()


def _words(matrix: BinaryMatrix, place: Place) -> Tensor:
    """The words of a segment: int32, flat."""
    starts = (place.column, place.second, place.third, place.fourth)[: place.segment.terms]
    names = ("signs", *FURTHER_SIGNS)[: place.segment.terms]
    height = plan_of(matrix.layout).height
    planes = [
        _packed(getattr(matrix, name), start, place.segment.width, height)
        for name, start in zip(names, starts, strict=True)
    ]
    above = planes[0].new_zeros(len(planes[0]), ROWS_BEFORE)
    return torch.cat([above, *planes], 1).flatten()


def _packed(packed: Tensor, start: int, width: int, height: int) -> Tensor:
    """Bits of some columns of packed rows as words: int32 (words, height)."""
    column = torch.arange(start, start + width, device=packed.device)
    bits = (packed[:, column // 8] >> (column % 8)) & 1
    bits = torch.nn.functional.pad(bits, (0, -width % WORD, 0, height - len(packed)))
    place = torch.arange(WORD, device=packed.device)
    quad = place // 4
    words = bits.view(height, -1, WORD).long() << (16 * (quad % 2) + 4 * (place % 4) + quad // 2)
    return words.sum(-1).int().T


def _singles(matrix: BinaryMatrix, plan: TrellisPlan) -> Tensor:
    column = _columns(plan.singles, matrix.signs.device)
    signs = 2 * ((matrix.signs[:, column // 8] >> (column % 8)) & 1).to(torch.int16) - 1
    scales = matrix.row_scales[:, [place.row_scale for place in plan.singles]]
    return _rows(signs * scales if scales.dtype == torch.uint8 else signs.half() * scales, plan)


def _constants() -> list[int]:
    return [*(word for terms in sorted(COEFFICIENTS) for word in level_words(terms)), *TURNED, 0]


def _levels(terms: int) -> list[float]:
    """All levels of so many stored signs, filled up to 32."""
    values = level_values(terms)
    return [*values, *[0.0] * (32 - len(values))]


def unit_of(terms: int) -> float:
    """What a whole level stands for where levels are bytes: byte v for (v + 1/2) units."""
    return level_values(terms)[-1] / LARGEST_LEVEL[terms]


def level_bytes(terms: int) -> list[int]:
    """Bytes v, -128 to 127, of all levels of so many stored signs; of those with all signs turned, -1 - v."""
    upper = [round(value / unit_of(terms) - 0.5) for value in level_values(terms)[1 << terms :]]
    return [-1 - value for value in reversed(upper)] + upper


def level_words(terms: int) -> list[int]:
    """Four words of bytes: of up to two stored signs all levels, of more those whose first sign is +."""
    values = level_bytes(terms)
    table = values if terms <= 2 else values[1 << terms :]
    table = table + [0] * (16 - len(table))
    return [int.from_bytes(bytes(v & 255 for v in table[k : k + 4]), "little", signed=True) for k in range(0, 16, 4)]
