"""A matrix rebuilt from its scales, signs and groups staying as they are; and the gradients of the scales.

Native where the extension was built and tensors are float32 in the CPU's memory, else with PyTorch, a few calls a slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arbllm.binarize.code import all_levels
from arbllm.format.bitplanes import unpack_values
from arbllm.format.layout import Layout
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.trellis import level_numbers
from arbllm.native import extension

GROUP_BITS = 3
SIGN_BITS = (4, 8)


@dataclass(frozen=True, eq=False)
class Codes:
    """Signs and groups, a byte for each weight.

    Attributes:
        layout: the matrix's; it has column scales and no row means.
        values: uint8 (n, m) in stored order. Bits 0 and 1 are the group; bit 2 is set where the first sign is -1, bit 3
            where the second one is. In segments with a trellis, numbers of levels in `code.all_levels`.
        order: int32 (m), the natural column of each stored one.
    """

    layout: Layout
    values: Tensor
    order: Tensor

    @classmethod
    def from_matrix(cls, matrix: BinaryMatrix) -> Codes:
        """Those of a packed matrix, on its device."""
        layout = matrix.layout
        values = unpack_values(matrix.signs, layout.columns, SIGN_BITS[0], 0)
        planes = (
            (matrix.group_bitmap, layout.grouped_columns, 0, 1),
            (matrix.group_bitmap_high, layout.quartered_columns, 0, 2),
            (matrix.second_signs, layout.salient, SIGN_BITS[1], 0),
        )
        low, high, second = (
            None if plane is None else unpack_values(plane, width, clear, set) for plane, width, clear, set in planes
        )
        for place in layout.places:
            width, groups, terms, trellis = place.segment
            if trellis:
                continue
            part = values[:, place.column : place.column + width]
            for plane, start, present in (
                (low, place.low, groups >= 2),
                (high, place.high, groups == 4),
                (second, place.second, terms == 2),
            ):
                if plane is not None and present:
                    part += plane[:, start : start + width]
        values = values.view(torch.uint8)
        for place, numbers in level_numbers(layout, matrix.tensors(), slice(0, layout.rows)):
            values[:, place.column : place.column + place.segment.width] = numbers
        order = matrix.column_order()
        if order is None:
            order = torch.arange(layout.columns, device=values.device)
        return cls(layout, values, order.int())

    def native(self, scales: Tensor) -> ModuleType | None:
        """The extension, if it can compute with these scales."""
        return extension(scales.device) if scales.dtype == torch.float32 else None

    def rebuild(self, rows: Tensor, columns: Tensor) -> Tensor:
        """W, in natural order.

        Args:
            rows: row scales, float (n, S).
            columns: column scales, float (flat).

        Returns:
            (n, m), contiguous, in the dtype of the scales.
        """
        if native := self.native(rows):
            weight = rows.new_empty(self.values.shape)
            native.rebuild(*self._arrays(rows, columns), weight.numpy(), torch.get_num_threads())
            return weight
        weight = rows.new_zeros(self.values.shape)
        for stored, row, column, mask in self._slots():
            weight[:, stored].addcmul_(mask * columns[column], rows[:, row, None])
        return weight.index_select(1, self._stored)

    def contract(self, gradient: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the scales.

        Args:
            gradient: dL/dW, (n, m) in the dtype of the scales.
            rows: row scales, float (n, S).
            columns: column scales, float (flat).

        Returns:
            dL/drows (n, S) and dL/dcolumns (flat), which depend on the number of threads in rounding alone.
        """
        if native := self.native(rows):
            row_gradients = torch.empty_like(rows, memory_format=torch.contiguous_format)
            sums = columns.new_empty(min(torch.get_num_threads(), len(rows)), len(columns))
            arrays = self._arrays(rows, columns)
            native.contract(*arrays, gradient.contiguous().numpy(), row_gradients.numpy(), sums.numpy())
            return row_gradients, sums.sum(0)
        gradient = gradient.index_select(1, self.order)
        row_gradients, column_gradients = torch.empty_like(rows), torch.empty_like(columns)
        for stored, row, column, mask in self._slots():
            signed = gradient[:, stored] * mask
            row_gradients[:, row] = signed @ columns[column]
            column_gradients[column] = rows[:, row] @ signed
        return row_gradients, column_gradients

    @cached_property
    def _stored(self) -> Tensor:
        """The stored column of each natural one, int64 (m)."""
        return self.order.argsort()

    def _slots(self) -> Iterator[tuple[slice, int, slice, Tensor]]:
        """Of each scale slot: its stored columns, its row scale and column scales, and what these are multiplied by.

        That is signs, int8 (n, width), 0 where a weight is of another group; or levels, float32.
        """
        for place in self.layout.places:
            width, _, terms, trellis = place.segment
            stored = slice(place.column, place.column + width)
            codes = self.values[:, stored]
            signs = [] if trellis else [1 - (codes & bit).ne(0).to(torch.int8) * 2 for bit in SIGN_BITS[:terms]]
            for slot in range(place.segment.slots):
                start = place.column_scale + slot * width
                factors = (
                    all_levels(codes.device)[codes.int()]
                    if trellis
                    else signs[slot % terms] * ((codes & GROUP_BITS) == slot // terms)
                )
                yield stored, place.row_scale + slot, slice(start, start + width), factors

    def _arrays(self, rows: Tensor, columns: Tensor) -> tuple[Any, ...]:
        """What the extension reads."""
        places = [[*place.segment, place.column, place.row_scale, place.column_scale] for place in self.layout.places]
        tensors = (self.values, all_levels(), self.order, rows.detach().contiguous(), columns.detach().contiguous())
        return places, *(tensor.numpy() for tensor in tensors)
