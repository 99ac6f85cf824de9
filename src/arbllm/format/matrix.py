"""`BinaryMatrix`: the one representation of a binarized weight between solver, files, kernels and accounting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from arbllm.errors import CheckpointError
from arbllm.format.bitplanes import unpack, unpack_values
from arbllm.format.layout import Layout, Place

TILE_WEIGHTS = 2**19
"""Weights that are unpacked at a time: 2 MB in float32, which the caches of a core hold."""

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


@dataclass(frozen=True)
class BinaryMatrix:
    """A binarized n x m weight, packed. Shapes and dtypes of all tensors: `Layout.tensors`; bit order: `bitplanes`.

    Weight (i, j) in group g of a segment s is ``mean[i, s, g] + sum over its terms t of sign_t[i, j] * row_scale[i, s,
    g, t] * column_scale[s, g, t, j]``. Without column scales the factor is 1, without row means the summand is 0. The
    bits of a row, and column scales, are in stored order (see `Layout`).

    Attributes:
        layout: sizes.
        signs: first signs, 1 bit a weight, set for +1.
        row_scales: float16 (n, S), or uint8 codes (n, S), S slots in the order that `Layout.places` describes.
        group_bitmap: low bit of the group number, of the columns in segments of two groups or more; None without any.
        group_bitmap_high: high bit, of the columns in segments of four groups; None without any.
        second_signs: second signs of the columns in segments of two terms; None without any.
        row_scale_steps: float16 (n), what a row's codes are multiples of; None with row scales in float16.
        row_means: float16 (n, Z), a slot a segment and group; None where the method has none.
        column_scales: float16, flat; None where the method has none.
        column_bitmap: 1 bit a column in natural order, set for salient ones; with ordering `bitmap`.
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
    row_scale_steps: Tensor | None = None
    row_means: Tensor | None = None
    column_scales: Tensor | None = None
    column_bitmap: Tensor | None = None
    explicit_order: Tensor | None = None
    report: SolveReport | None = field(default=None, compare=False)

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
        """Signs per weight, as papers count: 1 + the share of salient columns."""
        return 1 + self.layout.salient / self.layout.columns

    @property
    def error_history(self) -> tuple[tuple[float, ...], ...]:
        """Per block, the error after each step of the solver; empty for a matrix read from a file."""
        return self.report.error_history if self.report else ()

    def column_order(self) -> Tensor | None:
        """The natural column that each stored column is, int64 (m); None where the two orders are the same."""
        if self.column_bitmap is not None:
            return bitmap_order(unpack(self.column_bitmap, self.layout.columns), self.layout.block_size)
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
        weight = self._rows(slice(start, stop), self._factors())
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
        factors = self._factors()
        for start in range(0, self.layout.rows, rows):
            tile = slice(start, min(start + rows, self.layout.rows))
            yield tile, self._rows(tile, factors).to(dtype)

    def _factors(self) -> Tensor | None:
        return None if self.column_scales is None else self.column_scales.float()

    def _rows(self, rows: slice, factors: Tensor | None) -> Tensor:
        """Some rows of the dense weight in stored order, float32; `factors` are the column scales in float32."""
        layout, places = self.layout, self.layout.places
        scales = self.row_scales[rows].float()
        if self.row_scale_steps is not None:
            scales *= self.row_scale_steps[rows, None]
        planes = self._planes(rows)
        weight = torch.empty(len(scales), layout.columns, device=scales.device)
        for run in _runs(places):
            _fill(_part(weight, run), run, _Values(scales, factors, 0), planes)
        weight *= unpack_values(self.signs[rows], layout.columns, -1, 1)
        if self.second_signs is not None:
            signs = unpack_values(self.second_signs[rows], layout.salient, -1, 1)
            for run in _runs([place for place in places if place.segment.terms == 2]):
                values = _part(weight, run)
                second = _fill(torch.empty_like(values), run, _Values(scales, factors, 1), planes)
                start = run[0].second
                values += second.mul_(signs[:, start : start + second.shape[1]])
        if self.row_means is not None:
            means = _Values(self.row_means[rows].float())
            for run in _runs(places):
                values = _part(weight, run)
                values += _fill(torch.empty_like(values), run, means, planes)
        return weight

    def _planes(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Low and high bits of the group numbers in some rows, int8, all ones where set."""
        layout, low, high = self.layout, self.group_bitmap, self.group_bitmap_high
        return (
            None if low is None else unpack_values(low[rows], layout.grouped_columns, 0, -1),
            None if high is None else unpack_values(high[rows], layout.quartered_columns, 0, -1),
        )


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


@dataclass(frozen=True)
class _Values:
    """One term of every weight without its sign, or the row means.

    Attributes:
        parameters: row scales or means, float32 (rows, slots).
        factors: column scales, float32, flat, or None.
        term: which term; None for row means.
    """

    parameters: Tensor
    factors: Tensor | None = None
    term: int | None = None

    def spread(self, place: Place, group: int, out: Tensor) -> None:
        """Write the values that weights of `group` have in a segment into `out` (rows, width)."""
        if self.term is None:
            out.copy_(self.parameters[:, place.row_mean + group, None])
            return
        slot = group * place.segment.terms + self.term
        scales = self.parameters[:, place.row_scale + slot, None]
        if self.factors is None:
            out.copy_(scales)
            return
        start = place.column_scale + slot * place.segment.width
        torch.mul(scales, self.factors[start : start + place.segment.width], out=out)


def _runs(places: Sequence[Place]) -> list[list[Place]]:
    """Segments that follow each other and have as many groups: their weights choose among values all at once."""
    runs: list[list[Place]] = []
    for place in places:
        before = runs[-1][-1] if runs else None
        adjacent = before and before.column + before.segment.width == place.column
        if before and adjacent and before.segment.groups == place.segment.groups:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _part(weight: Tensor, run: Sequence[Place]) -> Tensor:
    """The columns of a run, a view."""
    return weight[:, run[0].column : run[-1].column + run[-1].segment.width]


def _fill(out: Tensor, run: Sequence[Place], values: _Values, planes: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Write into `out` (rows, columns of the run) the value that each weight's group has; returns `out`."""
    candidates = [out, *(torch.empty_like(out) for _ in range(run[0].segment.groups - 1))]
    for place in run:
        start = place.column - run[0].column
        for group, candidate in enumerate(candidates):
            values.spread(place, group, candidate[:, start : start + place.segment.width])
    for plane, start in zip(planes, (run[0].low, run[0].high), strict=True):
        if plane is not None and len(candidates) > 1:
            chosen = plane[:, start : start + out.shape[1]]
            candidates = [_select(*pair, chosen) for pair in zip(candidates[::2], candidates[1::2], strict=True)]
    return out


def _select(low: Tensor, high: Tensor, plane: Tensor) -> Tensor:
    """`high` where the plane is set, else `low`; in place and bitwise, as torch.where is many times slower on a CPU."""
    bits, difference = low.view(torch.int32), high.view(torch.int32)
    difference ^= bits
    difference &= plane
    bits ^= difference
    return low
