"""From the solver's blocks to the packed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arbllm.binarize.block import Block, Part, Zone
from arbllm.errors import ModelError
from arbllm.format.bitplanes import pack
from arbllm.format.layout import Layout
from arbllm.format.matrix import BinaryMatrix, SolveReport


def assemble(blocks: Sequence[Block], report: SolveReport | None = None) -> BinaryMatrix:
    """Pack the blocks of one matrix, left to right. All but the last have the same width.

    Zones of a part share its columns; in every block the regular parts have the same number of zones, and so do the
    salient ones, and either all zones have row means (column scales) or none.

    Raises:
        ModelError: a scale does not fit float16.
    """
    first = blocks[0].parts[0]
    rows = first.zones[0].mask.shape[0]
    columns = sum(block.width for block in blocks)
    planes = _Planes(rows, columns, first.columns.device)
    start = 0
    for block in blocks:
        planes.write(block, start)
        start += block.width
    regular = [block.regular for block in blocks if block.regular is not None]
    salient = [block.salient for block in blocks if block.salient is not None]
    parts = [part for block in blocks for part in block.parts]
    row_scales = torch.stack([term.row_scales for part in parts for zone in part.zones for term in zone.terms], 1)
    means = [zone.row_means for part in parts for zone in part.zones if zone.row_means is not None]
    layout = Layout(
        rows=rows,
        columns=columns,
        block_size=blocks[0].width,
        groups=len(regular[0].zones) if regular else 1,
        salient_groups=len(salient[0].zones) if salient else 1,
        salient=int(planes.salient.sum()),
        row_scale_slots=row_scales.shape[1],
        row_mean_slots=len(means),
        column_scaled=first.zones[0].terms[0].column_scales is not None,
    )
    tensors = planes.packed(layout)
    tensors["row_scales"] = _float16(row_scales)
    if means:
        tensors["row_means"] = _float16(torch.stack(means, 1))
    if layout.column_scaled and regular:
        tensors["column_scales"] = _float16(torch.cat([_column_scales(part)[:, 0] for part in regular], 1))
    if layout.column_scaled and salient:
        tensors["salient_column_scales"] = _float16(torch.cat([_column_scales(part) for part in salient], 2))
    return BinaryMatrix(layout=layout, report=report, **tensors)


class _Planes:
    """Unpacked signs, second signs, groups and column bitmap of a matrix being assembled."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.signs = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self.groups = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        self.salient = torch.zeros(columns, dtype=torch.bool, device=device)
        self.second: list[Tensor] = []

    def write(self, block: Block, start: int) -> None:
        for part in block.parts:
            place = part.columns + start
            self.signs[:, place] = _signs(part.zones, 0)
            for group, zone in enumerate(part.zones[1:], start=1):
                self.groups[:, place] += zone.mask.to(torch.uint8) * group
        if block.salient is not None:
            self.salient[block.salient.columns + start] = True
            self.second.append(_signs(block.salient.zones, 1))

    def packed(self, layout: Layout) -> dict[str, Tensor]:
        tensors = {"signs": pack(self.signs)}
        if layout.bitmap_planes:
            planes = [(self.groups >> plane) & 1 for plane in range(layout.bitmap_planes)]
            tensors["group_bitmap"] = pack(torch.stack(planes, 1))
        if layout.salient:
            tensors["column_bitmap"] = pack(self.salient)
            tensors["second_signs"] = pack(torch.cat(self.second, 1))
        return tensors


def _signs(zones: Sequence[Zone], term: int) -> Tensor:
    """Each weight's sign in its own zone, bool (n, k)."""
    signs = zones[0].terms[term].signs > 0
    for zone in zones[1:]:
        signs = torch.where(zone.mask, zone.terms[term].signs > 0, signs)
    return signs


def _column_scales(part: Part) -> Tensor:
    """Column scales of a part, (zones, terms, k)."""
    scales = [[term.column_scales for term in zone.terms if term.column_scales is not None] for zone in part.zones]
    return torch.stack([torch.stack(terms) for terms in scales])


def _float16(values: Tensor) -> Tensor:
    stored = values.half()
    if not torch.isfinite(stored).all():
        raise ModelError(
            f"a scale of {float(values.abs().max()):.3g} does not fit float16 (at most 65504); "
            "the weights are unusually large: rescale them, or leave this layer dense"
        )
    return stored
