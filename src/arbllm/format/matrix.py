"""`BinaryMatrix`: the one representation of a binarized weight between solver, files, kernels and accounting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from arbllm.errors import CheckpointError
from arbllm.format.bitplanes import unpack
from arbllm.format.layout import Layout

ROW_TILE = 256


@dataclass(frozen=True)
class SolveReport:
    """What the solver saw while it made a matrix. It is not stored with the packed tensors.

    Attributes:
        output_error: tr(D H D^T) / tr(W H W^T), D = W - W_hat; 0 where the layer has no output.
        weight_error: ||D||_F^2 / ||W||_F^2.
        damping: the damping factor that made H positive definite (see `BinarizationConfig.damping`).
        error_history: one tuple a block: the block's summed error, as its method measures it, after the start and after each step.
    """

    output_error: float
    weight_error: float
    damping: float
    error_history: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class BinaryMatrix:
    """A binarized n x m weight, packed. Shapes and dtypes of all tensors: `Layout.tensors`; bit order: `bitplanes`.

    Weight (i, j) of a regular column in block b and group g is ``row_means + sign * row_scales[i, slot] * column_scales[g, j]``;
    a salient column adds a second signed term. Without column scales the factor is 1, without row means the summand is 0.

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
            CheckpointError: a tensor is missing, unexpected, or has another dtype or shape; the message names `name.tensor`.
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
        return cls(layout=layout, **{key: tensors[key] for key in expected})

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, in file order."""
        return {name: getattr(self, name) for name in self.layout.tensors()}

    def map(self, change: Callable[[Tensor], Tensor]) -> BinaryMatrix:
        """The same matrix with every stored tensor passed through `change` (for example to another device)."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

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
        tiles = [self.dequantize_rows(start, start + ROW_TILE, dtype) for start in range(0, self.layout.rows, ROW_TILE)]
        return torch.cat(tiles)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [start, stop) of the dense weight, computed in float32 and rounded to `dtype`."""
        columns = self._columns()
        signs = unpack(self.signs[start:stop], self.layout.columns)
        groups = self._groups(start, stop)
        scales = self.row_scales[start:stop].float()
        weight = _term(scales, columns.scale_slots, 1, groups, self.layout.groups, signs, columns.regular_scales)
        if columns.salient.numel():
            index = columns.salient
            codes = None if groups is None else groups[:, index]
            second = unpack(self.second_signs[start:stop], index.numel())  # type: ignore[index]
            slots, factors = columns.scale_slots[index], columns.salient_scales
            first_factors, second_factors = (None, None) if factors is None else factors.unbind(1)
            count = self.layout.salient_groups
            value = _term(scales, slots, 2, codes, count, signs[:, index], first_factors)
            value += _term(scales, slots + 1, 2, codes, count, second, second_factors)
            weight[:, index] = value
        if self.row_means is not None:
            count = max(self.layout.groups, self.layout.salient_groups)
            weight += _pick(self.row_means[start:stop].float(), columns.mean_slots, 1, groups, count, None)
        return weight.to(dtype)

    def _groups(self, start: int, stop: int) -> Tensor | None:
        """Group numbers (rows, m), uint8, or None with one group."""
        if self.group_bitmap is None:
            return None
        planes = unpack(self.group_bitmap[start:stop], self.layout.columns).to(torch.uint8)
        return planes[:, 0] if planes.shape[1] == 1 else planes[:, 0] + 2 * planes[:, 1]

    def _columns(self) -> _Columns:
        """Where the columns find their parameters; O(m), so it is computed anew rather than kept in step."""
        layout, device = self.layout, self.signs.device
        if self.column_bitmap is None:
            salient = torch.zeros(layout.columns, dtype=torch.bool, device=device)
        else:
            salient = unpack(self.column_bitmap, layout.columns)
        regular_scales = salient_scales = None
        if layout.column_scaled:
            regular_scales = torch.ones(layout.groups, layout.columns, device=device)
            if self.column_scales is not None:
                regular_scales[:, ~salient] = self.column_scales.float()
            if self.salient_column_scales is not None:
                salient_scales = self.salient_column_scales.float()
        return _Columns(
            salient=salient.nonzero().squeeze(1),
            scale_slots=slots(salient, layout.block_size, layout.groups, 2 * layout.salient_groups),
            mean_slots=slots(salient, layout.block_size, layout.groups, layout.salient_groups),
            regular_scales=regular_scales,
            salient_scales=salient_scales,
        )


@dataclass(frozen=True)
class _Columns:
    """Per column: first slot of its zones (m), column factors (groups, m), and the salient columns' indices (c)."""

    salient: Tensor
    scale_slots: Tensor
    mean_slots: Tensor
    regular_scales: Tensor | None
    salient_scales: Tensor | None


def slots(salient: Tensor, block_size: int, regular_width: int, salient_width: int) -> Tensor:
    """First slot of each column's zones: blocks in order, in a block the regular zones before the salient ones.

    Args:
        salient: bool (m), the column bitmap.
        block_size: columns of a block.
        regular_width: slots of a block that has a regular column.
        salient_width: further slots of a block that has a salient column.

    Returns:
        int64 (m).
    """
    block = torch.arange(salient.numel(), device=salient.device) // block_size
    count = int(block[-1]) + 1
    has_salient = torch.zeros(count, dtype=torch.bool, device=salient.device).index_fill_(0, block[salient], True)
    has_regular = torch.zeros(count, dtype=torch.bool, device=salient.device).index_fill_(0, block[~salient], True)
    regular, widths = regular_width * has_regular, salient_width * has_salient
    starts = (regular + widths).cumsum(0) - widths
    return starts[block] - torch.where(salient, 0, regular[block])


def _pick(values: Tensor, first: Tensor, stride: int, groups: Tensor | None, count: int, factors: Tensor | None) -> Tensor:
    """values[i, first[j] + stride * group(i, j)] * factors[group, j] for every weight, float32 (rows, columns)."""
    last = values.shape[1] - 1
    picked = values[:, first.clamp(max=last)]
    if factors is not None:
        picked *= factors[0]
    for group in range(1, count if groups is not None else 1):
        other = values[:, (first + stride * group).clamp(max=last)]
        if factors is not None:
            other *= factors[group]
        picked = torch.where(groups == group, other, picked)
    return picked


def _term(
    scales: Tensor, first: Tensor, stride: int, groups: Tensor | None, count: int, signs: Tensor, factors: Tensor | None
) -> Tensor:
    """One signed term: `_pick`, negated where the sign bit is clear."""
    picked = _pick(scales, first, stride, groups, count, factors)
    return torch.where(signs, picked, -picked)

