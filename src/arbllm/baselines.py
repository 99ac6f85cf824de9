"""What binarization is compared with: round-to-nearest and GPTQ on uniform grids, one matrix, all bits counted.

Both give each row a grid of 2^bits equal steps per group of columns: value = scale * (code - zero), with the scale in
float16 and the zero one of the codes. GPTQ (arXiv 2210.17323) rounds column by column and spreads each column's error
over the columns still to come.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.errors import ConfigError, ModelError
from arbllm.factor import Factor, factorize

BITS = (2, 3, 4, 8)
SCALE_BITS = 16
# Shrink factors that the clipping search tries, in hundredths.
SHRINKS = range(100, 19, -1)
SMALLEST_SCALE = 2.0**-24


class Rounded(NamedTuple):
    """A rounded matrix: `weight`, dequantized, float32 (n, m), and `true_bits`, everything stored, per weight."""

    weight: Tensor
    true_bits: float


class Grid(NamedTuple):
    """One row's grid for each of n rows: `scales` and `zeros` float32 (n), codes 0 to `top`."""

    scales: Tensor
    zeros: Tensor
    top: int

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest values of the grids, float32 (..., n), for values of that shape."""
        codes = (values / self.scales).round_().add_(self.zeros).clamp_(0, self.top)
        return codes.sub_(self.zeros).mul_(self.scales)


def round_to_nearest(weight: Tensor, bits: int, *, group_size: int = 128, clip: bool = True) -> Rounded:
    """Round every weight to its grid.

    Args:
        weight: W, (n, m), outputs by inputs, any floating dtype.
        bits: of a code: 2, 3, 4 or 8.
        group_size: columns that share a grid; the last group may be shorter.
        clip: shrink each grid to where its squared error is least; otherwise it spans all weights of its group.

    Raises:
        ConfigError: `bits` or `group_size` is out of range, or W is not a matrix.
        ModelError: W has NaN or infinite entries, or is too large for float16 scales.
    """
    columns = _columns(weight, bits, group_size)
    rounded = [fit_grid(group, bits, clip).nearest(group) for group in columns.split(group_size)]
    return Rounded(torch.cat(rounded).T.contiguous(), true_bits(weight.shape[0], len(columns), bits, group_size))


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    *,
    group_size: int = 128,
    clip: bool = True,
    by_energy: bool = False,
    damping: float = 0.01,
    factor: Factor | None = None,
) -> Rounded:
    """Round column by column, with error feedback.

    With (H + lambda I)^-1 = U^T U, the error e = (w_j - q_j) / U_jj of column j is best made up for by subtracting
    e U_jk from each later column k. Inside a group that happens at once; the columns after the group get the sum of its
    feedback in one matrix product. A group's grid is fitted when its turn comes, on the weights as they are then.

    Args:
        weight: W, (n, m), outputs by inputs, any floating dtype.
        hessian: H = (2 / N) sum x x^T over the layer's inputs, (m, m), undamped.
        bits: of a code: 2, 3, 4 or 8.
        group_size: columns that share a grid; the last group may be shorter.
        clip: as in `round_to_nearest`.
        by_energy: take the columns by falling diag H, groups included; the order is stored and counted.
        damping: lambda, in units of the mean of diag H.
        factor: `factorize(hessian, damping)`, where the caller has it already; not used with `by_energy`.

    Raises:
        ConfigError: `bits` or `group_size` is out of range, or shapes do not fit.
        ModelError: NaN or infinite entries, or W is too large for float16 scales.
    """
    columns = _columns(weight, bits, group_size)
    if hessian.shape != (len(columns),) * 2:
        raise ConfigError(
            f"a weight of shape (n, m) needs a Hessian (m, m), not {list(weight.shape)} and {list(hessian.shape)}"
        )
    if by_energy:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        columns, factor = columns[order], factorize(hessian[order][:, order], damping)
    factor = factor or factorize(hessian, damping)
    columns = columns.masked_fill(factor.dead[:, None], 0.0)
    for start in range(0, len(columns), group_size):
        end = min(start + group_size, len(columns))
        errors = _round_group(columns[start:end], factor.upper[start:end, start:end], bits, clip)
        columns[end:] -= factor.upper[start:end, end:].T @ errors
    if by_energy:
        columns = columns[order.argsort()]
    stored = true_bits(weight.shape[0], len(columns), bits, group_size, ordered=by_energy)
    return Rounded(columns.T.contiguous(), stored)


def true_bits(rows: int, columns: int, bits: int, group_size: int, *, ordered: bool = False) -> float:
    """Bits per weight of codes, a float16 scale and a zero of `bits` bits per row and group, and the column order.

    The order takes 16 bits a column, or 32 where a matrix has more than 32767 columns.
    """
    grids = rows * math.ceil(columns / group_size) * (SCALE_BITS + bits)
    order = columns * (16 if columns < 2**15 else 32) if ordered else 0
    return bits + (grids + order) / (rows * columns)


def fit_grid(values: Tensor, bits: int, clip: bool) -> Grid:
    """A grid for each row of one group.

    Without clipping it spans the weights and zero; with clipping it is that span times the factor, one of `SHRINKS`
    hundredths, that leaves the least squared error.

    Args:
        values: the group's weights, one column of W a row of it, float32 (k, n).
        bits: of a code.
        clip: whether to search.
    """
    low, high = values.amin(0).clamp(max=0.0), values.amax(0).clamp(min=0.0)
    best = _spanning(low, high, bits)
    if not clip:
        return best
    least = (best.nearest(values) - values).square_().sum(0)
    for hundredths in SHRINKS:
        grid = _spanning(low * (hundredths / 100), high * (hundredths / 100), bits)
        error = (grid.nearest(values) - values).square_().sum(0)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros)
        best = Grid(scales, zeros, best.top)
    return best


def _spanning(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The grid from `low` <= 0 to `high` >= 0, (n) each; zero is one of its values."""
    top = 2**bits - 1
    # A scale of zero, in a group of zeros, would divide by zero; the smallest that float16 has rounds them to zero.
    scales = ((high - low) / top).half().float().clamp(min=SMALLEST_SCALE)
    return Grid(scales, (-low / scales).round().clamp(0, top), top)


def _round_group(columns: Tensor, triangle: Tensor, bits: int, clip: bool) -> Tensor:
    """Round one group in place, (k, n), with feedback inside it; the errors e, (k, n), for the columns after it."""
    grid = fit_grid(columns, bits, clip)
    errors = torch.empty_like(columns)
    for place, diagonal in enumerate(triangle.diagonal().tolist()):
        rounded = grid.nearest(columns[place])
        errors[place] = (columns[place] - rounded) / diagonal
        columns[place] = rounded
        columns[place + 1 :].addr_(triangle[place, place + 1 :], errors[place], alpha=-1)
    return errors


def _columns(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """A copy of W, transposed, float32 (m, n), so that its columns lie together; refuses what cannot be rounded."""
    if bits not in BITS:
        raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits!r}")
    if type(group_size) is not int or group_size < 1:
        raise ConfigError(f"group_size must be a whole number of at least 1, not {group_size!r}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ConfigError(f"a weight must have the shape (n, m), not {list(weight.shape)}")
    columns = weight.detach().float().T.clone(memory_format=torch.contiguous_format)
    if not torch.isfinite(columns).all():
        raise ModelError("its weight has NaN or infinite entries: the model file is damaged, or was saved that way")
    if columns.abs().max() > torch.finfo(torch.float16).max:
        raise ModelError("its weight has entries beyond float16, and so would its scales: rescale the layer")
    return columns
