"""`BinaryMatrix`: the one representation of a binarized weight between solver, files, kernels and accounting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arbllm.errors import CheckpointError
from arbllm.format.bitplanes import unpack
from arbllm.format.decode import Decoder
from arbllm.format.layout import Layout
from arbllm.format.scales import decode_scales, encode_scales

TILE_WEIGHTS = 2**19
"""Weights that are unpacked at a time: 2 MB in float32, which the caches of a core hold."""

ORDER_TENSORS = ("column_bitmap", "column_segments", "column_order")
"""The tensors that say which column each stored column is; a layout has one of them at most."""

# The stored tensor whose name `BinaryMatrix` has a method of.
_FIELDS = {"column_order": "explicit_order"}


@dataclass(frozen=True)
class SolveReport:
    """What the solver saw while it made a matrix. It is not stored with the packed tensors.

    Attributes:
        output_error: tr(D H D^T) / tr(W H W^T), D = W - W_hat; 0 where the layer has no output.
        weight_error: ||D||_F^2 / ||W||_F^2.
        damping: the damping factor that made H positive definite (see `BinarizationConfig.damping`).
        error_history: one tuple a block: its error, as the method measures it, after the start and after each step.
    """

    output_error: float
    weight_error: float
    damping: float
    error_history: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, eq=False)  # tensors do not compare to a bool
class BinaryMatrix:
    """A binarized n x m weight, packed. Shapes and dtypes of all tensors: `Layout.tensors`; bit order: `bitplanes`.

    Weight (i, j) in group g of a segment s is ``mean[i, s, g] + sum over its terms t of sign_t[i, j] * row_scale[i, s,
    g, t] * column_scale[s, g, t, j]``. Without column scales the factor is 1, without row means the summand is 0. The
    bits of a row, and column scales, are in stored order (see `Layout`). In a segment with a trellis it is
    ``level[i, j] * row_scale[i, s] * column_scale[s, j]`` (see `trellis`).

    Attributes:
        layout: sizes.
        signs: first signs, 1 bit a weight, set for +1.
        row_scales: float16 (n, S), or uint8 codes (n, S), S slots in the order that `Layout.places` describes.
        scale_steps: float16 (S), what codes of the slot's row and column scales are multiplied by; None with float16.
        group_bitmap: low bit of the group number, of the columns in segments of two groups or more; None without any.
        group_bitmap_high: high bit, of the columns in segments of four groups; None without any.
        second_signs: second signs of the columns in segments of two terms or more; None without any.
        third_signs: third signs of the columns in segments of three terms or more; None without any.
        fourth_signs: fourth signs of the columns in segments of four terms; None without any.
        row_means: float16 (n, Z), a slot a segment and group; None where the method has none.
        column_scales: float16 or uint8 codes, flat; None where the method has none.
        column_bitmap: 1 bit a column in natural order, set for salient ones; with ordering `bitmap`.
        column_segments: number of each column's segment, in bit planes (least significant first), in natural order;
            with ordering `segments`.
        explicit_order: the tensor `column_order`: the natural column of each stored column, int16 or int32 (m); with
            ordering `explicit`.
        report: the solver's figures, where this matrix comes from the solver.
    """

    layout: Layout
    signs: Tensor
    row_scales: Tensor
    group_bitmap: Tensor | None = None
    group_bitmap_high: Tensor | None = None
    second_signs: Tensor | None = None
    third_signs: Tensor | None = None
    fourth_signs: Tensor | None = None
    scale_steps: Tensor | None = None
    row_means: Tensor | None = None
    column_scales: Tensor | None = None
    column_bitmap: Tensor | None = None
    column_segments: Tensor | None = None
    explicit_order: Tensor | None = None
    report: SolveReport | None = None

    @classmethod
    def from_tensors(cls, layout: Layout, tensors: Mapping[str, Tensor], name: str = "matrix") -> BinaryMatrix:
        """Build from stored tensors, checking each against the layout.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or has another dtype or shape; the message names
                `name.tensor`.
        """
        expected = layout.tensors()
        for key in tensors:
            if key not in expected:
                raise CheckpointError(f"{name}.{key}: this tensor does not belong to the layout in config.json")
        for key, (dtype, shape) in expected.items():
            if key not in tensors:
                raise CheckpointError(f"{name}.{key}: missing from the checkpoint")
            found = tensors[key]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise CheckpointError(
                    f"{name}.{key}: expected {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}"
                )
        stored: dict[str, Any] = {_FIELDS.get(key, key): tensors[key] for key in expected}
        return cls(layout=layout, **stored)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, in file order."""
        return {name: getattr(self, _FIELDS.get(name, name)) for name in self.layout.tensors()}

    def map(self, change: Callable[[Tensor], Tensor]) -> BinaryMatrix:
        """The same matrix with every stored tensor passed through `change` (for example to another device)."""
        changed: dict[str, Any] = {_FIELDS.get(name, name): change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows n, columns m)."""
        return self.layout.rows, self.layout.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def true_bits(self) -> float:
        """Stored bits per weight, everything included."""
        return 8 * self.nbytes / self.layout.weights

    @property
    def nominal_bits(self) -> float:
        """Signs per weight, as papers count: 1 + the share of salient columns, those of a trellis as it has them."""
        return self.layout.signs / self.layout.columns

    @property
    def error_history(self) -> tuple[tuple[float, ...], ...]:
        """Per block, the error after each step of the solver; empty for a matrix read from a file."""
        return self.report.error_history if self.report else ()

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Row scales, float32 (n, S), and column scales, float32, flat, or None without any."""
        return decode_scales(self.tensors(), self.layout)

    def with_scales(self, row_scales: Tensor, column_scales: Tensor | None) -> BinaryMatrix:
        """The same signs and groups with other scales, rounded as this matrix stores them.

        Args:
            row_scales: positive, float32 (n, S).
            column_scales: positive, float32, flat as `scales` gives them.
        """
        changed: dict[str, Any] = {**encode_scales(row_scales, column_scales, self.layout)}
        return replace(self, **changed, report=None)

    def column_order(self) -> Tensor | None:
        """The natural column that each stored column is, int64 (m); None where the two orders are the same."""
        if self.column_bitmap is not None:
            return bitmap_order(unpack(self.column_bitmap, self.layout.columns), self.layout.block_size)
        if self.column_segments is not None:
            return segment_numbers(self.column_segments, self.layout.columns).argsort(stable=True)
        return None if self.explicit_order is None else self.explicit_order.long()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (n, m), computed in float32 and rounded to `dtype`."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.signs.device)
        for rows, tile in self.tiles(dtype):
            dense[rows] = tile
        return dense

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [start, stop) of the dense weight, computed in float32 and rounded to `dtype`."""
        order = self.column_order()
        weight = Decoder(self.layout, self.tensors()).rows(slice(start, stop))
        return (weight if order is None else weight.index_select(1, order.argsort())).to(dtype)

    def tiles(self, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The dense weight, `rows` rows at a time: pairs of a slice of the rows and their values (rows, m).

        Without `rows`, as many as make `TILE_WEIGHTS` weights.
        """
        order = self.column_order()
        stored = None if order is None else order.argsort()
        for tile, weight in self.stored_tiles(dtype, rows):
            yield tile, weight if stored is None else weight.index_select(1, stored)

    def stored_tiles(
        self, dtype: torch.dtype = torch.float32, rows: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """As `tiles`, with the columns in stored order: x @ tile.T there is x[..., column_order] @ tile.T here."""
        rows = rows or max(1, TILE_WEIGHTS // self.layout.columns)
        decoder = Decoder(self.layout, self.tensors())
        for start in range(0, self.layout.rows, rows):
            tile = slice(start, min(start + rows, self.layout.rows))
            yield tile, decoder.rows(tile).to(dtype)


def bitmap_order(salient: Tensor, block_size: int) -> Tensor:
    """The order that a column bitmap stands for: in each block of columns the regular ones, then the salient ones.

    Args:
        salient: bool (m), in natural order.
        block_size: columns of a block.

    Returns:
        int64 (m), the natural column of each stored column.
    """
    block = torch.arange(salient.numel(), device=salient.device) // block_size
    return (2 * block + salient).argsort(stable=True)


def segment_numbers(planes: Tensor, columns: int) -> Tensor:
    """The number of each column's segment, int64 (columns), from bit planes, least significant first."""
    bits = unpack(planes, columns).long()
    return (bits << torch.arange(len(bits), device=bits.device)[:, None]).sum(0)


def check_order(layout: Layout, tensor: Tensor, name: str) -> None:
    """Refuse a stored column order, one of `ORDER_TENSORS`, that cannot be right.

    Raises:
        CheckpointError: the column order does not hold every column once, or the tensor gives the segments other
            columns than they can hold; the message begins with `name`.
    """
    if layout.ordering == "explicit":
        if tensor.long().sort().values.tolist() != list(range(layout.columns)):
            raise CheckpointError(f"{name} does not hold every column once; quantize the model again")
        return
    # The device is named throughout, as transformers has files verified where the default device is `meta`.
    widths = torch.tensor([segment.width for segment in layout.segments], device=tensor.device)
    if layout.ordering == "segments":
        fits = torch.equal(segment_numbers(tensor, layout.columns).bincount(minlength=len(widths)), widths)
    else:
        salient = unpack(tensor, layout.columns)
        kinds = torch.tensor([segment.terms >= 2 for segment in layout.segments], device=tensor.device)
        stored = kinds.repeat_interleave(widths)
        fits = torch.equal(salient[bitmap_order(salient, layout.block_size)], stored)
    if not fits:
        raise CheckpointError(f"{name} does not agree with the segments in config.json; quantize the model again")
