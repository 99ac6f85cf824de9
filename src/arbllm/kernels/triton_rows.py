"""Products of a few tokens with 8-bit rows on a GPU: tensor cores take the codes as they are stored, scales follow.

With TRITON_INTERPRET=1 in the environment before the first import this runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbllm.kernels import reference
from arbllm.kernels.triton_parts import INTERPRETED

LEAST_TOKENS = 16
"""Of a product of tiles: fewer are padded to these."""
ROWS, COLUMNS = 32, 128
"""Of a tile of codes; the columns are read one tile after the other."""
WARPS, STAGES = 4, 4


def multiply(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply by a weight in 8-bit rows: y = x (scale * code)^T, sums in float32.

    Args:
        x: (t, d) in bfloat16, float16 or float32, on the codes' device; all t tokens are held in registers.
        codes: int8 (V, d).
        scales: float16 (V).

    Returns:
        (t, V) in the dtype of x.

    Raises:
        ValueError: x has another number of columns than the weight.
    """
    (tokens, height), width = (len(x), len(codes)), codes.shape[1]
    reference.check_width(x, width)
    y = x.new_empty(tokens, height)
    if y.numel():
        multiply_byte_rows[(triton.cdiv(height, ROWS),)](
            x.contiguous(), codes.contiguous(), scales, y, tokens, height, width,
            TOKENS=max(LEAST_TOKENS, triton.next_power_of_2(tokens)), ROWS=ROWS, COLUMNS=COLUMNS,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y


@triton.jit
def multiply_byte_rows(
    x, codes, scales, y, tokens, height, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some rows of y^T: grid (tiles of rows). Codes are exact in every dtype that inputs have."""
    token, row = tl.arange(0, TOKENS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    asked, there = token < tokens, row < height
    code_rows = codes + row.to(tl.int64)[:, None] * width
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        code = tl.load(code_rows + column[None, :], mask=there[:, None] & inside[None, :], other=0)
        inputs = tl.load(x + token[None, :] * width + column[:, None], mask=asked[None, :] & inside[:, None], other=0.0)
        if INTERPRETED:
            sums = tl.dot(code.to(tl.float32), inputs.to(tl.float32), sums)
        else:
            sums = tl.dot(code.to(inputs.dtype), inputs, sums, input_precision=PRECISION)
    scale = tl.load(scales + row, mask=there, other=0.0).to(tl.float32)
    to = y + token.to(tl.int64)[None, :] * height + row[:, None]
    tl.store(to, (sums * scale[:, None]).to(y.dtype.element_ty), mask=there[:, None] & asked[None, :])
