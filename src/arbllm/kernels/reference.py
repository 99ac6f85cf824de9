"""The plain PyTorch kernel: a tile of rows is unpacked, multiplied and dropped. It runs wherever PyTorch does."""

from __future__ import annotations

import torch
from torch import Tensor

from arbllm.format.matrix import BinaryMatrix


def matmul(x: Tensor, matrix: BinaryMatrix) -> Tensor:
    """Multiply by the packed weight: y = x W^T.

    On a CPU half-precision products are computed in float32, which is faster there and no less exact; elsewhere in the
    dtype of x.

    Args:
        x: (..., m) of any floating dtype and any strides.
        matrix: the packed W (n, m), on the device of x.

    Returns:
        (..., n) in the dtype of x. Of the dense W, `format.matrix.TILE_WEIGHTS` weights exist at a time.

    Raises:
        ValueError: x has another number of columns than the weight, or is not of floating point.
    """
    check_width(x, matrix.layout.columns)
    dtype = _computing_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    order = matrix.column_order()
    if order is not None:
        rows = rows.index_select(1, order)
    y = x.new_empty(len(rows), matrix.layout.rows)
    for tile, weight in matrix.stored_tiles(dtype):
        y[:, tile] = rows @ weight.T
    return y if x.dim() == 2 else y.view(*x.shape[:-1], matrix.layout.rows)


def multiply_transposed(y: Tensor, matrix: BinaryMatrix) -> Tensor:
    """Multiply by the packed weight the other way, as gradients go: x = y W.

    Args:
        y: (..., n) of any floating dtype and any strides.
        matrix: the packed W (n, m), on the device of y.

    Returns:
        (..., m) in the dtype of y.
    """
    dtype = _computing_dtype(y)
    rows = y.reshape(-1, y.shape[-1]).to(dtype)
    x = rows.new_zeros(len(rows), matrix.layout.columns)
    for tile, weight in matrix.stored_tiles(dtype):
        x += rows[:, tile] @ weight
    order = matrix.column_order()
    if order is not None:
        x = torch.empty_like(x).index_copy_(1, order.long(), x)
    return x.view(*y.shape[:-1], matrix.layout.columns).to(y.dtype)


def _computing_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def check_width(x: Tensor, columns: int) -> None:
    """Refuse inputs of another width than a weight's, which kernels would read beyond, or of another kind.

    Raises:
        ValueError: they are.
    """
    check_kind(x)
    if x.shape[-1] != columns:
        raise ValueError(f"inputs have {x.shape[-1]} columns, the packed weight has {columns}")


def check_kind(x: Tensor) -> None:
    """Refuse inputs that a linear layer has no product with.

    Raises:
        ValueError: they are of integers or complex numbers, or not even a vector.
    """
    if not x.dim() or not x.is_floating_point():
        raise ValueError(f"inputs must be floating-point vectors, not {x.dtype} of shape {list(x.shape)}")
