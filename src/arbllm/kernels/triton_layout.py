"""How a packed matrix lies in GPU memory, so that its bits are tensor core operands after a single operation.

Matrices with a trellis lie as `triton_trellis_layout` has it. Columns of one kind (as many groups and signs) lie
together, in pieces of CHUNK = 64. In each piece a word of 16 bits holds 4 columns of each of 4 rows: bit ``4 q + b`` of
word w is column ``16 b + w`` of the piece in row ``q * quarter + i``, quarter = ceil(rows / 4). A word masked to one of
its bits 0 to 11 is a power of two as float16: 2^(bit - 24), since up to bit 9 it is a subnormal number and bits 10 and
11 begin the exponent. So the product of a bit plane with activations needs one mask for two weights and no conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arbllm.format.layout import Place
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels.prepared import PreparedTensors
from arbllm.kernels.triton_plan import CHUNK, ROWS_OF_A_WORD, WORDS, Family, Plan, Run, plan_of, rows_of_words

PIECE = 32 * CHUNK
"""Columns that are repacked at a time."""


@dataclass(frozen=True)
class Prepared(PreparedTensors):
    """A packed matrix as the Triton kernels read it.

    Attributes:
        plan: where what is.
        words: int16, flat: for each family (chunks, planes, quarter, WORDS); planes are first signs, second signs where
            there are two, low and high bits of the group number where there are groups.
        order: int32, natural column of each column in `words`, then of each in `singles`; both padded, with 0.
        row_scales: uint8 codes or float16, (slots, rows), up to the last slot that a run uses.
        steps: float16, (slots), what codes are multiplied by; empty without codes.
        column_scales: as stored, flat; empty without any.
        row_means: float16 (slots, rows); empty without any.
        singles: segments of one column, one group and one sign: int16 (k, rows) signed codes, or signed scales, of the
            dtype of row scales.
        single_columns: int32 (3, k): natural column, scale slot, place in the column scales.
        run_table: int32 (runs, fields of `Run`).
    """

    plan: Plan
    words: Tensor
    order: Tensor
    row_scales: Tensor
    steps: Tensor
    column_scales: Tensor
    row_means: Tensor
    singles: Tensor
    single_columns: Tensor
    run_table: Tensor


def prepare(matrix: BinaryMatrix) -> Prepared:
    """Repack a matrix without a trellis for the GPU; its column scales and steps are shared.

    Args:
        matrix: on any device; the result is on the same.
    """
    layout, device, plan = matrix.layout, matrix.signs.device, plan_of(matrix.layout)
    order = matrix.column_order()
    natural = torch.arange(layout.columns, device=device) if order is None else order
    words, columns = [torch.empty(0, dtype=torch.int16, device=device)], []
    for family in plan.families:
        words += _repack(matrix, family)
        columns.append(_padded(torch.cat([natural[_span(place)] for place in family.places]), family.chunks * CHUNK))
    singles, single_columns = _singles(matrix, plan.alone, natural)
    columns.append(_padded(single_columns[0], plan.columns - plan.single_start))
    empty = matrix.row_scales.new_empty(0)
    return Prepared(
        plan=plan,
        words=torch.cat(words),
        order=torch.cat(columns).int(),
        row_scales=matrix.row_scales[:, : _slots(plan)].T.contiguous(),
        steps=empty.half() if matrix.scale_steps is None else matrix.scale_steps,
        column_scales=empty if matrix.column_scales is None else matrix.column_scales,
        row_means=empty.half() if matrix.row_means is None else matrix.row_means.T.contiguous(),
        singles=singles,
        single_columns=single_columns,
        run_table=torch.tensor(plan.runs, dtype=torch.int32).reshape(-1, len(Run._fields)).to(device),
    )


def _slots(plan: Plan) -> int:
    """Row scale slots up to the last that a run uses; single columns, which keep their own scales, come last."""
    places = (place for family in plan.families for place in family.places)
    return max((place.row_scale + place.segment.slots for place in places), default=0)


def _span(place: Place) -> slice:
    return slice(place.column, place.column + place.segment.width)


def _repack(matrix: BinaryMatrix, family: Family) -> Iterator[Tensor]:
    """The words of a family, a few chunks at a time, flat."""
    kind, chunks, quarter = family.kind, family.chunks, rows_of_words(matrix.layout)
    signs = [("signs", "column"), ("second_signs", "second")]
    groups = [("group_bitmap", "low"), ("group_bitmap_high", "high")]
    sources = signs[: kind.terms] + groups[: kind.groups.bit_length() - 1]
    device = matrix.signs.device
    where = [
        torch.cat([torch.arange(p.segment.width, device=device) + getattr(p, field) for p in family.places])
        for _, field in sources
    ]
    for start in range(0, chunks * CHUNK, PIECE):
        size = min(PIECE, chunks * CHUNK - start)
        planes = [
            _words(_bits(getattr(matrix, name), index[start : start + size]), size // CHUNK, quarter)
            for (name, _), index in zip(sources, where, strict=True)
        ]
        yield torch.cat(planes, 1).flatten()


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


def _singles(matrix: BinaryMatrix, places: Sequence[Place], natural: Tensor) -> tuple[Tensor, Tensor]:
    device = natural.device
    columns, slots, factors = (
        torch.tensor([getattr(place, field) for place in places], dtype=torch.int64, device=device)
        for field in ("column", "row_scale", "column_scale")
    )
    scales = matrix.row_scales[:, slots]
    signs = 2 * _bits(matrix.signs, columns) - 1
    values = signs.to(torch.int16) * scales if matrix.layout.scale_bits == 8 else signs.half() * scales
    return values.T.contiguous(), torch.stack([natural[columns], slots, factors]).int()
