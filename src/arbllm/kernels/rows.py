"""Products of a few tokens with 8-bit rows from the codes as they are stored.

On the CPU in C++ (csrc/rows_kernel.h), on a GPU in Triton (`triton_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arbllm.kernels import cpu, cuda
from arbllm.kernels.modes import is_followed

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TOKENS = 16
"""With more, unpacking tiles of the weight takes less time."""

_library = torch.library.Library("arbllm", "FRAGMENT")
_library.define("rows_matmul(Tensor x, Tensor codes, Tensor scales, int instruction_set) -> Tensor")


def suits(x: Tensor) -> bool:
    """Whether `multiply` takes inputs x (t, d)."""
    if x.shape[0] > MOST_TOKENS or (x.requires_grad and torch.is_grad_enabled()) or is_followed():
        return False
    if x.is_cpu:
        return x.dtype in CPU_DTYPES and cpu.available()
    return x.is_cuda and x.dtype in cuda.DTYPES and cuda.available()


def multiply(x: Tensor, codes: Tensor, scales: Tensor, instruction_set: str | None = None) -> Tensor:
    """Multiply by a weight in 8-bit rows: y = x (scale * code)^T, sums in float32.

    Args:
        x: (t, d), of those that `suits` approves.
        codes: int8 (V, d).
        scales: float16 (V).
        instruction_set: one of `cpu.instruction_sets`; None for the best. A GPU has no choice.

    Returns:
        (t, V) in the dtype of x.

    Raises:
        ConfigError: this processor does not have the instruction set.
        ValueError: x has another number of columns than the weight.
    """
    chosen = 0 if instruction_set is None else cpu.instruction_set_number(instruction_set)
    return torch.ops.arbllm.rows_matmul(x, codes, scales, chosen)


@torch.library.impl(_library, "rows_matmul", "CPU")
def _compute(x: Tensor, codes: Tensor, scales: Tensor, instruction_set: int) -> Tensor:
    inputs = x.float().contiguous()
    y = inputs.new_empty(len(x), len(codes))
    arrays = (inputs.detach(), codes.contiguous(), scales.float(), y)
    cpu.native_module().multiply_rows(*arrays, instruction_set, torch.get_num_threads())
    return y.to(x.dtype)


@torch.library.impl(_library, "rows_matmul", "CUDA")
def _compute_on_gpu(x: Tensor, codes: Tensor, scales: Tensor, instruction_set: int) -> Tensor:
    from arbllm.kernels import triton_rows  # Triton need not be installed

    with torch.cuda.device(x.device):
        return triton_rows.multiply(x, codes, scales)


@torch.library.impl(_library, "rows_matmul", "Meta")
def _fake(x: Tensor, codes: Tensor, scales: Tensor, instruction_set: int) -> Tensor:
    return x.new_empty(len(x), len(codes))
