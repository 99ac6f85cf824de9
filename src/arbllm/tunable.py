"""`TunableLinear`: a packed linear whose scales can be trained, its signs and groups staying as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arbllm.errors import ConfigError
from arbllm.format.bitplanes import unpack_values
from arbllm.format.layout import Layout
from arbllm.format.matrix import BinaryMatrix


class TunableLinear(nn.Module):
    """y = x W^T + bias, W rebuilt from trainable scales in every forward pass.

    Scales are trained by their logarithms: they stay positive, and one learning rate suits large and small ones.

    >>> layer = TunableLinear(matrix, bias)
    >>> ...                       # train layer.parameters()
    >>> tuned = layer.to_matrix()

    Attributes:
        row_changes: float32 (n, S), logarithm of each row scale's change.
        column_changes: float32 (flat), likewise of the column scales.
        bias: float (n), or None; not trained.
    """

    def __init__(self, matrix: BinaryMatrix, bias: Tensor | None = None, transposed: bool = False) -> None:
        """Start from the scales that the matrix has.

        Args:
            matrix: the packed weight.
            bias: float (n), or None.
            transposed: see `BinaryLinear`; kept for the layer that takes the place of this one.

        Raises:
            ConfigError: it has row means or no column scales; only arb-rc and arb-rcx can be tuned.
        """
        super().__init__()
        if not matrix.layout.column_scaled or matrix.layout.row_means:
            raise ConfigError("only scales of arb-rc and arb-rcx can be tuned; choose one of these methods")
        self.transposed = transposed
        self._matrix = matrix
        self._order = matrix.column_order()
        self._row_scales, factors = matrix.scales()
        assert factors is not None, "the layout has column scales"
        self._column_scales = factors
        self._signs = signed_masks(matrix)
        self.row_changes = nn.Parameter(torch.zeros_like(self._row_scales))
        self.column_changes = nn.Parameter(torch.zeros_like(self._column_scales))
        self.bias = None if bias is None else bias.detach()

    def scales(self) -> tuple[Tensor, Tensor]:
        """Row scales (n, S) and column scales (flat) as they are now, float32."""
        return self._row_scales * self.row_changes.exp(), self._column_scales * self.column_changes.exp()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., m) to y (..., n), in the dtype of x."""
        weight = _Weight.apply(*self.scales(), self._signs, self._matrix.layout)
        x = x if self._order is None else x.index_select(-1, self._order)
        return nn.functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def to_matrix(self) -> BinaryMatrix:
        """The packed matrix with the scales as they are now, rounded as it stores them."""
        return self._matrix.with_scales(*self.scales())


def signed_masks(matrix: BinaryMatrix) -> list[Tensor]:
    """Of each segment in stored order, each weight's sign in each scale slot, 0 outside its group.

    Returns:
        int8 (slots, n, width) for each segment.
    """
    layout = matrix.layout
    signs = [unpack_values(matrix.signs, layout.columns, -1, 1)]
    if matrix.second_signs is not None:
        signs.append(unpack_values(matrix.second_signs, layout.salient, -1, 1))
    planes = [
        unpack_values(plane, width, 0, 1)
        for plane, width in (
            (matrix.group_bitmap, layout.grouped_columns),
            (matrix.group_bitmap_high, layout.quartered_columns),
        )
        if plane is not None
    ]
    masks = []
    for place in layout.places:
        width, groups, terms = place.segment
        group = torch.zeros_like(signs[0][:, :width])
        for plane, start, worth in zip(planes, (place.low, place.high), (1, 2), strict=False):
            if groups > worth:
                group += plane[:, start : start + width] * worth
        starts = place.column, place.second
        own = [signs[term][:, starts[term] : starts[term] + width] for term in range(terms)]
        masks.append(torch.stack([sign * (group == g) for g in range(groups) for sign in own]))
    return masks


class _Weight(torch.autograd.Function):
    """W in stored order from its scales; by hand, since autograd would keep every product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, signs: list[Tensor], layout: Layout) -> Tensor:
        """Sum over slots of signs * (r c^T), float32 (n, m)."""
        ctx.save_for_backward(rows, columns)
        ctx.signs, ctx.layout = signs, layout
        weight = rows.new_zeros(layout.rows, layout.columns)
        for place, masks in zip(layout.places, signs, strict=True):
            width = place.segment.width
            values = weight[:, place.column : place.column + width]
            for slot, mask in enumerate(masks):
                start = place.column_scale + slot * width
                values.addcmul_(mask * columns[start : start + width], rows[:, place.row_scale + slot, None])
        return weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of the scales."""
        rows, columns = ctx.saved_tensors
        row_gradients, column_gradients = torch.zeros_like(rows), torch.zeros_like(columns)
        for place, masks in zip(ctx.layout.places, ctx.signs, strict=True):
            width = place.segment.width
            gradient = gradients[0][:, place.column : place.column + width]
            for slot, mask in enumerate(masks):
                signed = gradient * mask
                start = place.column_scale + slot * width
                row_gradients[:, place.row_scale + slot] = signed @ columns[start : start + width]
                column_gradients[start : start + width] = rows[:, place.row_scale + slot] @ signed
        return row_gradients, column_gradients, None, None
