"""`BinaryMatrix`: the one representation of a binarized weight between solver, files, kernels and accounting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from arbllm.errors import CheckpointError
from arbllm.format.bitplanes import unpack, unpack_values
from arbllm.format.layout import Layout

TILE_WEIGHTS = 2**19
"""Weights that are unpacked at a time: 2 MB in float32, which the caches of a core hold."""


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

    Weight (i, j) of a regular column in group g is ``mean + sign * row_scales[i, slot] * column_scales[g, j]``, mean
    and slot being those of its block and group; a salient column adds a second signed term. Without column scales the
    factor is 1, without row means the summand is 0.

    Attributes:
        layout: sizes.
        signs: first signs, 1 bit a weight, set for +1.
        row_scales: float16 (n, S), S slots in the order that `Layout` describes.
        group_bitmap: group number of each weight, in bit planes (least significant first), or None with one group.
        column_bitmap: set for salient columns, or None without any.
        second_signs: second signs of the salient columns, in column order.
        row_means: float16 (n, zones).
        column_scales: float16 (groups, m - c), regular columns in order.
        salient_column_scales: float16 (salient_groups, 2, c), salient columns in order.
        report: the solver's figures, where this matrix comes from the solver.
    """

    layout: Layout
    signs: Tensor
    row_scales: Tensor
    group_bitmap: Tensor | None = None
    column_bitmap: Tensor | None = None
    second_signs: Tensor | None = None
    row_means: Tensor | None = None
    column_scales: Tensor | None = None
    salient_column_scales: Tensor | None = None
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
        stored: dict[str, Any] = {key: tensors[key] for key in expected}
        return cls(layout=layout, **stored)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, in file order."""
        return {name: getattr(self, name) for name in self.layout.tensors()}

    def map(self, change: Callable[[Tensor], Tensor]) -> BinaryMatrix:
        """The same matrix with every stored tensor passed through `change` (for example to another device)."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (n, m), computed in float32 and rounded to `dtype`."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.signs.device)
        for rows, tile in self.tiles():
            dense[rows] = tile
        return dense

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [start, stop) of the dense weight, computed in float32 and rounded to `dtype`."""
        return self._rows(slice(start, stop), self._columns()).to(dtype)

    def tiles(self, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The dense weight, `rows` rows at a time: pairs of a slice of the rows and their values (rows, m).

        Without `rows`, as many as make `TILE_WEIGHTS` weights.
        """
        rows = rows or max(1, TILE_WEIGHTS // self.layout.columns)
        columns = self._columns()
        for start in range(0, self.layout.rows, rows):
            tile = slice(start, min(start + rows, self.layout.rows))
            yield tile, self._rows(tile, columns).to(dtype)

    def _rows(self, rows: slice, columns: _Columns) -> Tensor:
        """Some rows of the dense weight, float32: regular values everywhere, then the salient columns over them."""
        layout = self.layout
        signs = unpack_values(self.signs[rows], layout.columns, -1, 1)
        planes: tuple[Tensor, ...] = ()
        if self.group_bitmap is not None:
            planes = unpack_values(self.group_bitmap[rows], layout.columns, 0, -1).unbind(1)
        scales = self.row_scales[rows].float()
        means = None if self.row_means is None else self.row_means[rows].float()

        values = [columns.spread(scales, columns.scale_slots + g, g) for g in range(layout.groups)]
        weight = _choose(values, planes).mul_(signs)
        if means is not None:
            weight += _choose([columns.spread(means, columns.mean_slots + g) for g in range(layout.groups)], planes)
        if self.second_signs is None:
            return weight

        index = columns.salient
        planes = tuple(plane.index_select(1, index) for plane in planes)
        second = unpack_values(self.second_signs[rows], layout.salient, -1, 1)
        salient = torch.zeros(len(weight), layout.salient, device=weight.device)
        for term, term_signs in enumerate((signs.index_select(1, index), second)):
            slots = columns.salient_scale_slots + term
            values = [scales.index_select(1, slots + 2 * g) for g in range(layout.salient_groups)]
            if columns.salient_factors is not None:
                values = [value.mul_(columns.salient_factors[g, term]) for g, value in enumerate(values)]
            salient += _choose(values, planes).mul_(term_signs)
        if means is not None:
            slots = columns.salient_mean_slots
            salient += _choose([means.index_select(1, slots + g) for g in range(layout.salient_groups)], planes)
        return weight.index_copy_(1, index, salient)

    def _columns(self) -> _Columns:
        """Where the columns find their parameters; O(m), so it is computed anew rather than kept in step."""
        layout, device = self.layout, self.signs.device
        salient = torch.zeros(layout.columns, dtype=torch.bool, device=device)
        if self.column_bitmap is not None:
            salient = unpack(self.column_bitmap, layout.columns)
        factors = None
        if layout.column_scaled:
            factors = torch.ones(layout.groups, layout.blocks * layout.block_size, device=device)
            if self.column_scales is not None:
                factors[:, : layout.columns][:, ~salient] = self.column_scales.float()
        index = salient.nonzero().squeeze(1)
        block = index // layout.block_size
        scale_slots, salient_scale_slots = slots(salient, layout.block_size, layout.groups, 2 * layout.salient_groups)
        mean_slots, salient_mean_slots = slots(salient, layout.block_size, layout.groups, layout.salient_groups)
        return _Columns(
            width=layout.columns,
            block_size=layout.block_size,
            scale_slots=scale_slots,
            mean_slots=mean_slots,
            factors=factors,
            salient=index,
            salient_scale_slots=salient_scale_slots[block],
            salient_mean_slots=salient_mean_slots[block],
            salient_factors=None if self.salient_column_scales is None else self.salient_column_scales.float(),
        )


@dataclass(frozen=True)
class _Columns:
    """Where the columns of a matrix find their parameters.

    Attributes:
        width: m.
        block_size: K.
        scale_slots: first row scale of each block's regular columns, int64 (blocks).
        mean_slots: the same for row means.
        factors: column scales of the regular columns, 1 elsewhere, float32 (groups, blocks * K), or None.
        salient: the salient columns, int64 (c).
        salient_scale_slots: first row scale of each salient column, int64 (c).
        salient_mean_slots: the same for row means.
        salient_factors: float32 (salient_groups, 2, c), or None.
    """

    width: int
    block_size: int
    scale_slots: Tensor
    mean_slots: Tensor
    factors: Tensor | None
    salient: Tensor
    salient_scale_slots: Tensor
    salient_mean_slots: Tensor
    salient_factors: Tensor | None

    def spread(self, parameters: Tensor, slots: Tensor, group: int | None = None) -> Tensor:
        """One parameter a row and block (rows, S) at all columns (rows, m), times the column scales of `group`."""
        # A block of salient columns alone has no regular slot: what it reads here is overwritten.
        value = parameters.index_select(1, slots.clamp(max=parameters.shape[1] - 1)).unsqueeze(2)
        if group is None or self.factors is None:
            value = value.expand(-1, -1, self.block_size).contiguous()
        else:
            value = value * self.factors[group].view(-1, self.block_size)
        return value.flatten(1)[:, : self.width]


def slots(salient: Tensor, block_size: int, regular_width: int, salient_width: int) -> tuple[Tensor, Tensor]:
    """First slots of each block's regular and salient zones: blocks in order, in a block the regular zones first.

    Args:
        salient: bool (m), the column bitmap.
        block_size: columns of a block.
        regular_width: slots of a block that has a regular column.
        salient_width: further slots of a block that has a salient column.

    Returns:
        Two int64 tensors (blocks). Where a block has no column of the kind, its entry means nothing.
    """
    length, device = salient.numel(), salient.device
    block = torch.arange(length, device=device) // block_size
    present = torch.zeros(2, -(-length // block_size), dtype=torch.int64, device=device)
    present[salient.long(), block] = 1
    regular, widths = regular_width * present[0], salient_width * present[1]
    starts = (regular + widths).cumsum(0) - regular - widths
    return starts, starts + regular


def _choose(candidates: Sequence[Tensor], planes: Sequence[Tensor]) -> Tensor:
    """The candidate that each weight's group bits name, float32 (rows, columns); the candidates are used up.

    Args:
        candidates: one value of every weight for each group, 1, 2 or 4 of them.
        planes: bit planes of the group numbers, least significant first, int8, all ones where set.
    """
    for plane in planes:
        if len(candidates) == 1:
            break
        candidates = [_select(*pair, plane) for pair in zip(candidates[::2], candidates[1::2], strict=True)]
    return candidates[0]


def _select(low: Tensor, high: Tensor, plane: Tensor) -> Tensor:
    """`high` where the plane is set, else `low`; in place and bitwise, as torch.where is many times slower on a CPU."""
    bits, difference = low.view(torch.int32), high.view(torch.int32)
    difference ^= bits
    difference &= plane
    bits ^= difference
    return low
