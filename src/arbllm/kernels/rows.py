"""Products of a few tokens with 8-bit rows on the CPU, by PyTorch's kernel for such weights."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TOKENS = 16
"""With more, unpacking tiles of the weight takes less time."""
_WIDTH = 64
"""Rows are multiples of this: PyTorch's kernel reads beyond the end of others."""

_library = torch.library.Library("arbllm", "FRAGMENT")
_library.define("rows_matmul(Tensor x, Tensor codes, Tensor scales) -> Tensor")


def suits(x: Tensor, codes: Tensor) -> bool:
    """Whether `multiply` takes inputs x (t, d) and codes (V, d)."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and len(x) <= MOST_TOKENS
        and codes.shape[1] % _WIDTH == 0
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def multiply(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply by a weight in 8-bit rows: y = x (scale * code)^T.

    Args:
        x: bfloat16 (t, d), of those that `suits` approves.
        codes: int8 (V, d).
        scales: float16 (V).

    Returns:
        bfloat16 (t, V), rounded twice: before the scale, and after it.
    """
    return torch.ops.arbllm.rows_matmul(x, codes, scales)


@torch.library.impl(_library, "rows_matmul", "CPU")
def _compute(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    # The kernel's own scales are bfloat16, too coarse for ours.
    unscaled = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes.contiguous(), x.new_ones(len(codes)))
    return (unscaled * scales.float()).to(x.dtype)


@torch.library.impl(_library, "rows_matmul", "Meta")
def _fake(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(len(x), len(codes))
