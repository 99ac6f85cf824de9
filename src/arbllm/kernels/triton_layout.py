"""How a packed matrix lies in GPU memory: words where `triton_plan` says, scales and tables beside them.

Column ``4 q + j`` of a word, q = 2 b + h, is its bit ``16 h + 4 j + b``: bit b of all its half-bytes makes the numbers
of eight weights' bytes, of which a single instruction looks up four, those of four columns that follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from arbllm.binarize.code import COEFFICIENTS, level_values
from arbllm.binarize.scales import shares
from arbllm.format.layout import Place
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.trellis import FURTHER_SIGNS
from arbllm.kernels.triton_plan import ROWS_BEFORE, SINGLES_TOGETHER, UNIT, WORD, Plan, kind_of, plan_of, width_of

PIECE = 2**22
"""Bits that are repacked at a time, about."""
TURNED = (0x00FF00FF, 0x0000FFFF, -1)
"""Of four half-bytes' bit 0, 1 and 2, what a byte permutation makes all ones in the bytes where it is not set."""
LARGEST_LEVEL = {1: 113.5, 2: 117.45, 3: 94.35, 4: 113.15}
"""By which number the largest level is told where levels are the odd multiples of 1/2 up to 127.5: the one by which
they are nearest to such multiples. They are off by 0.001, 0.11, 0.29 and 0.37 % (root mean squares, levels alike)."""
_PLANES = (("signs", "column"), *zip(FURTHER_SIGNS, ("second", "third", "fourth"), strict=True))
_GROUPS = (("group_bitmap", "low"), ("group_bitmap_high", "high"))


@dataclass(frozen=True)
class Prepared:
    """A packed matrix as the Triton kernels read it.

    Attributes:
        plan: where what is.
        words: int32, flat: for each word of columns of each stream, ROWS_BEFORE zeros, then (planes, height): first
            signs, further ones, low and high bits of the group.
        order: int32, the natural column of each column, first those in words, then `singles`; 0 of those that fill
            words up, or `singles` up to a multiple of SINGLES_TOGETHER.
        factors: float32, flat: for each stream (slots, columns), what a weight is multiplied by besides its row scale
            or mean; then those of `singles`. 0 of columns that fill up.
        row_scales: uint8 codes or float16 (slots of all bands, height).
        row_means: float16 (groups of all bands, height), or empty.
        levels: int32 (20): of each number of stored signs the four words of bytes that `triton_levels` looks levels up
            in, then its other constants.
        exact_levels: float32 (4, 32): of each number of stored signs all levels.
        singles: int16 (k, height), signed codes of columns with a scale for each weight, or float16, signed scales.
    """

    plan: Plan
    words: Tensor
    order: Tensor
    factors: Tensor
    row_scales: Tensor
    row_means: Tensor
    levels: Tensor
    exact_levels: Tensor
    singles: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the class, as an operator takes them."""
        return [getattr(self, each.name) for each in fields(self)[1:]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def prepare(matrix: BinaryMatrix) -> Prepared:
    """Repack a matrix for the GPU.

    Args:
        matrix: on any device; the result is on the same.
    """
    layout, device, plan = matrix.layout, matrix.signs.device, plan_of(matrix.layout)
    stored = matrix.column_order()
    natural = torch.arange(layout.columns, device=device) if stored is None else stored
    places = [place for stream in plan.streams for place in stream]
    nothing = natural.new_empty(0)
    columns = [_filled(natural[_columns(stream, device)], width_of(stream)) for stream in plan.streams]
    singles = _filled(natural[_columns(plan.singles, device)], _up(len(plan.singles)))
    factors = [_factors(matrix, stream) for stream in plan.streams]
    return Prepared(
        plan=plan,
        words=_all_words(matrix, plan),
        order=torch.cat([*columns, singles]).int(),
        factors=torch.cat([*factors, _single_factors(matrix, plan)]),
        row_scales=_rows(matrix.row_scales[:, _ranges([(p.row_scale, p.segment.slots) for p in places], device)], plan),
        row_means=nothing.half()
        if matrix.row_means is None
        else _rows(matrix.row_means[:, _ranges([(p.row_mean, p.segment.groups) for p in places], device)], plan),
        levels=torch.tensor(_constants(), dtype=torch.int32).to(device),
        exact_levels=torch.tensor([_levels(terms) for terms in sorted(COEFFICIENTS)]).to(device),
        singles=_singles(matrix, plan),
    )


def _ranges(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Ranges, as (start, length), one after the other: int64."""
    ranges = [torch.arange(start, start + length) for start, length in spans]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ranges]).to(device)


def _columns(places: Sequence[Place], device: torch.device, field: str = "column") -> Tensor:
    """Columns of some segments in a stored tensor, int64."""
    return _ranges([(getattr(place, field), place.segment.width) for place in places], device)


def _filled(values: Tensor, length: int) -> Tensor:
    """Values (..., k) filled up with zeros."""
    return torch.nn.functional.pad(values, (0, length - values.shape[-1]))


def _up(singles: int) -> int:
    return -(-singles // SINGLES_TOGETHER) * SINGLES_TOGETHER


def _factors(matrix: BinaryMatrix, stream: Sequence[Place]) -> Tensor:
    """Of segments that lie together: float32, flat (slots, columns)."""
    scales = torch.cat([_column_factors(matrix, place) for place in stream], 1)
    if matrix.layout.row_means and not stream[0].segment.trellis:
        scales = torch.cat([scales, scales.new_ones(stream[0].segment.groups, scales.shape[1])])
    return _filled(scales, width_of(stream)).flatten()


def _column_factors(matrix: BinaryMatrix, place: Place) -> Tensor:
    """Column scales of a segment times the steps that codes are in: float32 (slots, width)."""
    slots, width = place.segment.slots, place.segment.width
    factors = torch.ones(slots, width, device=matrix.signs.device)
    if matrix.column_scales is not None:
        scales = matrix.column_scales[place.column_scale : place.column_scale + slots * width]
        factors *= (scales.float() if matrix.scale_steps is None else shares(scales)).view(slots, width)
    if matrix.scale_steps is not None:
        factors *= matrix.scale_steps[place.row_scale : place.row_scale + slots, None].float()
    return factors


def _single_factors(matrix: BinaryMatrix, plan: Plan) -> Tensor:
    factors = [_column_factors(matrix, place).flatten() for place in plan.singles]
    return _filled(torch.cat([torch.empty(0, device=matrix.signs.device), *factors]), _up(len(factors)))


def _rows(values: Tensor, plan: Plan) -> Tensor:
    """Values (rows, k) as (k, height)."""
    return _filled(values.T, plan.height).contiguous()


def _all_words(matrix: BinaryMatrix, plan: Plan) -> Tensor:
    """The words of all streams, int32, flat."""
    sizes = [width_of(stream) // WORD * UNIT * plan.size(kind_of(stream[0])) for stream in plan.streams]
    words = torch.zeros(sum(sizes), dtype=torch.int32, device=matrix.signs.device)
    for stream, into in zip(plan.streams, words.split(sizes), strict=True):
        _write_words(matrix, stream, into.view(width_of(stream) // WORD, -1), plan.height)
    return words


def _write_words(matrix: BinaryMatrix, stream: Sequence[Place], into: Tensor, height: int) -> None:
    """Write the words of segments that lie together behind the zeros of `into` (words, size)."""
    kind, rows, device = kind_of(stream[0]), matrix.layout.rows, matrix.signs.device
    sources = _PLANES[: kind.terms] + (() if kind.trellis else _GROUPS[: kind.groups.bit_length() - 1])
    piece = max(PIECE // (rows * WORD), 1)
    for plane, (name, field) in enumerate(sources):
        columns = _columns(stream, device, field)
        begin = ROWS_BEFORE + plane * height
        for start in range(0, len(into), piece):
            packed = _packed(getattr(matrix, name), columns[start * WORD : (start + piece) * WORD])
            into[start : start + piece, begin : begin + rows] = packed


def _packed(packed: Tensor, columns: Tensor) -> Tensor:
    """Bits of some columns of packed rows as words: int32 (words, rows)."""
    bits = _bits(packed, columns)
    bits = torch.nn.functional.pad(bits, (0, -len(columns) % WORD)).view(len(packed), -1, WORD)
    place = torch.arange(WORD, dtype=torch.int32, device=packed.device)
    quad = place // 4
    return (bits.int() << (16 * (quad % 2) + 4 * (place % 4) + quad // 2)).sum(-1, dtype=torch.int32).T


def _bits(packed: Tensor, columns: Tensor) -> Tensor:
    """Some columns of packed rows: uint8 (rows, k) of 0 and 1."""
    return (packed[:, columns // 8] >> (columns % 8).to(torch.uint8)) & 1


def _singles(matrix: BinaryMatrix, plan: Plan) -> Tensor:
    column = _columns(plan.singles, matrix.signs.device)
    signs = 2 * _bits(matrix.signs, column).to(torch.int16) - 1
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
