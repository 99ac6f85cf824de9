"""Products with 8-bit rows of which a tile at a time is unpacked: any number of tokens, any device, with gradients.

They are operators, so that a compiler sees one step each and not one for every tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from arbllm.format.rows import dequantize_rows
from arbllm.kernels.modes import is_followed

CPU_TILE_WEIGHTS = 2**20
"""A tile in float32 and its codes stay within the caches."""
DEVICE_TILE_WEIGHTS = 2**25

_library = torch.library.Library("arbllm", "FRAGMENT")
_library.define("row_tiles_matmul(Tensor x, Tensor codes, Tensor scales) -> Tensor")
_library.define("row_tiles_transposed(Tensor y, Tensor codes, Tensor scales) -> Tensor")


def multiply(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply by a weight in 8-bit rows: y = x (scale * code)^T; half precision is computed in float32 on a CPU.

    Args:
        x: (t, d), of any floating dtype.
        codes: int8 (V, d).
        scales: float16 (V).

    Returns:
        (t, V) in the dtype of x; gradients reach x.
    """
    if is_followed():  # by what knows no formulas of ours, such as derivatives in forward mode
        inputs = x.to(_computing_dtype(x))
        return torch.cat([inputs @ weight.T for _, weight in _tiles(codes, scales, inputs)], 1).to(x.dtype)
    return torch.ops.arbllm.row_tiles_matmul(x, codes, scales)


@torch.library.impl(_library, "row_tiles_matmul", "CompositeExplicitAutograd")
def _multiply(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    y, inputs = x.new_empty(len(x), len(codes)), x.to(_computing_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        for tile, weight in _tiles(codes, scales, inputs):
            y[:, tile] = inputs @ weight.T
    return y


@torch.library.impl(_library, "row_tiles_transposed", "CompositeExplicitAutograd")
def _multiply_transposed(y: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    inputs = y.to(_computing_dtype(y))
    x = inputs.new_zeros(len(y), codes.shape[1])
    with torch.autocast(y.device.type, enabled=False):
        for tile, weight in _tiles(codes, scales, inputs):
            x += inputs[:, tile] @ weight
    return x.to(y.dtype)


def _computing_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_cpu and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _tiles(codes: Tensor, scales: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, (CPU_TILE_WEIGHTS if like.is_cpu else DEVICE_TILE_WEIGHTS) // codes.shape[1])
    for start in range(0, len(codes), step):
        tile = slice(start, start + step)
        yield tile, dequantize_rows(codes[tile], scales[tile], like.dtype)


@torch.library.impl(_library, "row_tiles_matmul", "Meta")
def _fake(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(len(x), len(codes))


@torch.library.impl(_library, "row_tiles_transposed", "Meta")
def _fake_transposed(y: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return y.new_empty(len(y), codes.shape[1])


def _keep_weight(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.arbllm.row_tiles_transposed(gradient, *ctx.saved_tensors), None, None


def _second_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.arbllm.row_tiles_matmul(gradient, *ctx.saved_tensors), None, None


for _name, _backward in (("row_tiles_matmul", _gradient), ("row_tiles_transposed", _second_gradient)):
    torch.library.register_autograd(f"arbllm::{_name}", _backward, setup_context=_keep_weight, lib=_library)
