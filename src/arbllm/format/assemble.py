"""From the solver's parts to the packed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from arbllm.binarize.block import Part
from arbllm.binarize.trellis import TrellisPart
from arbllm.format.bitplanes import pack
from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix, SolveReport, bitmap_order
from arbllm.format.scales import encode_scales, to_float16
from arbllm.format.trellis import FURTHER_SIGNS

AnyPart = Part | TrellisPart


def assemble(
    parts: Sequence[AnyPart],
    report: SolveReport | None = None,
    *,
    block_size: int | None = None,
    scale_bits: int = 16,
) -> BinaryMatrix:
    """Pack the parts of one matrix, each into one segment, in the order given.

    Args:
        parts: `Part.columns` are the natural columns of the matrix, in the order that they shall be stored in; together
            the parts hold every column once. The zones of a part have the same number of terms, and either all zones
            have row means (column scales) or none.
        report: the solver's figures.
        block_size: where the regular columns of each block of so many columns are stored before its salient ones, the
            order is kept as a bitmap of the salient columns. Where the columns of each part ascend, the number of each
            column's part is kept; any other order is kept as a list.
        scale_bits: 8 stores row and column scales as codes (see `arbllm.binarize.scales`); the caller has rounded them
            to such codes. 16 stores them as float16.

    Returns:
        The packed matrix, whose `dequantize` is what the parts reconstruct, their parameters rounded to float16.

    Raises:
        ModelError: a scale does not fit float16, or is negative where codes are wanted.
    """
    order = torch.cat([part.columns for part in parts])
    segments = [Segment(len(part.columns), *part.kind) for part in parts]
    salient = torch.zeros_like(order, dtype=torch.bool)
    salient[order] = torch.cat([torch.full_like(part.columns, part.kind[1]) for part in parts]) >= 2
    ordering = _ordering(parts, order, salient, block_size)
    scales = [pair for part in parts for pair in part.scales]
    means = [mean for part in parts for mean in part.row_means]
    factors = [factor for _, factor in scales if factor is not None]
    layout = Layout(
        rows=len(scales[0][0]),
        columns=len(order),
        segments=tuple(segments),
        ordering=ordering,
        block_size=block_size if block_size and ordering == "bitmap" else 0,
        scale_bits=scale_bits,
        row_means=bool(means),
        column_scaled=bool(factors),
    )
    rows, columns = torch.stack([row for row, _ in scales], 1), torch.cat(factors) if factors else None
    tensors = _planes(parts) | encode_scales(rows, columns, layout)
    if means:
        tensors["row_means"] = to_float16(torch.stack(means, 1))
    if ordering == "bitmap":
        tensors["column_bitmap"] = pack(salient)
    if ordering == "segments":
        number = torch.empty_like(order)
        number[order] = torch.cat([torch.full_like(part.columns, place) for place, part in enumerate(parts)])
        tensors["column_segments"] = pack(torch.stack([(number >> p & 1).bool() for p in range(layout.segment_planes)]))
    if ordering == "explicit":
        tensors["column_order"] = order.to(layout.tensors()["column_order"][0])
    return replace(BinaryMatrix.from_tensors(layout, tensors), report=report)


def _ordering(parts: Sequence[AnyPart], order: Tensor, salient: Tensor, block_size: int | None) -> str:
    """The cheapest way to store an order, as `Layout.ordering` names it."""
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return "natural"
    if block_size and torch.equal(order, bitmap_order(salient, block_size)):
        return "bitmap"
    ascending = all((part.columns.diff() > 0).all() for part in parts)
    return "segments" if ascending else "explicit"


def _planes(parts: Sequence[AnyPart]) -> dict[str, Tensor]:
    """All that has a bit a weight."""
    groups = [part.group_numbers if part.kind[0] > 1 else None for part in parts]
    planes = {
        "signs": [part.signs(0) for part in parts],
        "group_bitmap": [number & 1 for number in groups if number is not None],
        "group_bitmap_high": [
            number >> 1 for part, number in zip(parts, groups, strict=True) if number is not None and part.kind[0] == 4
        ],
    }
    for term, name in enumerate(FURTHER_SIGNS, start=1):
        planes[name] = [part.signs(term) for part in parts if part.kind[1] > term]
    return {name: pack(torch.cat(bits, 1)) for name, bits in planes.items() if bits}
