"""From the solver's parts to the packed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from arbllm.binarize.block import Part, Zone
from arbllm.errors import ModelError
from arbllm.format.bitplanes import pack
from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix, SolveReport, bitmap_order

LARGEST_CODE = 255


def assemble(
    parts: Sequence[Part],
    report: SolveReport | None = None,
    *,
    block_size: int | None = None,
    row_scale_steps: Tensor | None = None,
) -> BinaryMatrix:
    """Pack the parts of one matrix, each into one segment, in the order given.

    Args:
        parts: `Part.columns` are the natural columns of the matrix, in the order that they shall be stored in; together
            the parts hold every column once. The zones of a part have the same number of terms, and either all zones
            have row means (column scales) or none.
        report: the solver's figures.
        block_size: where the regular columns of each block of so many columns are stored before its salient ones, the
            order is kept as a bitmap of the salient columns; any other order is kept as a list.
        row_scale_steps: float (n), all of float16 precision: row scales become 8-bit multiples of their row's step. The
            caller has rounded them to such multiples. None keeps row scales as float16.

    Returns:
        The packed matrix, whose `dequantize` is what the parts reconstruct, their parameters rounded to float16.

    Raises:
        ModelError: a scale does not fit float16, or is not 0 to 255 times its row's step.
    """
    zones = [zone for part in parts for zone in part.zones]
    order = torch.cat([part.columns for part in parts])
    segments = [Segment(len(part.columns), len(part.zones), len(part.zones[0].terms)) for part in parts]
    salient = torch.zeros_like(order, dtype=torch.bool)
    salient[order] = torch.cat([torch.full_like(part.columns, len(part.zones[0].terms)) for part in parts]) == 2
    ordering = _ordering(order, salient, block_size)
    layout = Layout(
        rows=zones[0].mask.shape[0],
        columns=len(order),
        segments=tuple(segments),
        ordering=ordering,
        block_size=block_size if block_size and ordering == "bitmap" else 0,
        row_scale_bits=16 if row_scale_steps is None else 8,
        row_means=zones[0].row_means is not None,
        column_scaled=zones[0].terms[0].column_scales is not None,
    )
    row_scales = torch.stack([term.row_scales for zone in zones for term in zone.terms], 1)
    means = [zone.row_means for zone in zones if zone.row_means is not None]
    factors = [term.column_scales for zone in zones for term in zone.terms if term.column_scales is not None]
    tensors = _planes(parts)
    if row_scale_steps is None:
        tensors["row_scales"] = _float16(row_scales)
    else:
        steps = _float16(row_scale_steps)
        tensors |= {"row_scales": _codes(row_scales, steps), "row_scale_steps": steps}
    if means:
        tensors["row_means"] = _float16(torch.stack(means, 1))
    if factors:
        tensors["column_scales"] = _float16(torch.cat(factors))
    if ordering == "bitmap":
        tensors["column_bitmap"] = pack(salient)
    if ordering == "explicit":
        tensors["column_order"] = order.to(layout.tensors()["column_order"][0])
    return replace(BinaryMatrix.from_tensors(layout, tensors), report=report)


def _ordering(order: Tensor, salient: Tensor, block_size: int | None) -> str:
    """The cheapest way to store an order, as `Layout.ordering` names it."""
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return "natural"
    if block_size and torch.equal(order, bitmap_order(salient, block_size)):
        return "bitmap"
    return "explicit"


def _planes(parts: Sequence[Part]) -> dict[str, Tensor]:
    """All that has a bit a weight."""
    groups = [_groups(part) for part in parts]
    planes = {
        "signs": [_signs(part.zones, 0) for part in parts],
        "group_bitmap": [groups[i] & 1 for i, part in enumerate(parts) if len(part.zones) >= 2],
        "group_bitmap_high": [groups[i] >> 1 for i, part in enumerate(parts) if len(part.zones) == 4],
        "second_signs": [_signs(part.zones, 1) for part in parts if len(part.zones[0].terms) == 2],
    }
    return {name: pack(torch.cat(bits, 1)) for name, bits in planes.items() if bits}


def _groups(part: Part) -> Tensor:
    """Each weight's group number, uint8 (n, k)."""
    number = torch.zeros_like(part.zones[0].mask, dtype=torch.uint8)
    for group, zone in enumerate(part.zones[1:], start=1):
        number += zone.mask.to(torch.uint8) * group
    return number


def _signs(zones: Sequence[Zone], term: int) -> Tensor:
    """Each weight's sign in its own zone, bool (n, k)."""
    signs = zones[0].terms[term].signs > 0
    for zone in zones[1:]:
        signs = torch.where(zone.mask, zone.terms[term].signs > 0, signs)
    return signs


def _codes(row_scales: Tensor, steps: Tensor) -> Tensor:
    """Row scales (n, S) as multiples of their row's step (n), uint8; a step of 0 has scales of 0 only."""
    unit = torch.where(steps == 0, 1, steps.float())[:, None]
    codes = (row_scales / unit).round()
    outside = ~((codes >= 0) & (codes <= LARGEST_CODE))
    if outside.any():
        raise ModelError(
            f"a row scale is {float(codes[outside][0]):g} times its row's step, but 8 bits hold 0 to {LARGEST_CODE}; "
            "quantize this layer with row scales of 16 bits, or leave it dense"
        )
    return codes.to(torch.uint8)


def _float16(values: Tensor) -> Tensor:
    stored = values.half()
    if not torch.isfinite(stored).all():
        raise ModelError(
            f"a scale of {float(values.abs().max()):.3g} does not fit float16 (at most 65504); "
            "the weights are unusually large: rescale them, or leave this layer dense"
        )
    return stored
