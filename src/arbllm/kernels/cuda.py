"""What runs on a GPU: the Triton kernel where Triton is installed, else the plain PyTorch one, which is said once."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of inputs that the Triton kernel takes."""
OLDEST = (8, 0)
"""The least compute capability: tensor cores before do not multiply as the Triton kernel does."""
Ready = tuple[list[Tensor], list[int]]
"""A prepared weight as the operator takes it: tensors, and the layout in numbers, the second of which are columns."""


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the Triton kernel can run; says so, once, if not."""
    return _triton() is not None


def prepare(matrix: BinaryMatrix) -> Ready:
    """The matrix as the Triton kernel reads it, on the same GPU, of about the size of the packed tensors."""
    module = _triton()
    assert module is not None, "callers ask whether it is available"
    ready: Ready = module.prepare(matrix)
    for tensor in ready[0]:
        torch._dynamo.mark_static_address(tensor)  # else a compiled model copies it for each CUDA graph that it runs
    return ready


def multiply(x: Tensor, ready: Ready, rows: int, *, exact: bool = False) -> Tensor:
    """Multiply by a prepared weight: y = x W^T.

    In bfloat16 or float16 inputs of a few tokens are rounded to 16 bits, scaled to the largest near them; with a
    trellis those of up to some hundreds, and levels to 8 bits (of 1 to 4 stored signs by 0.001, 0.1, 0.3 and 0.4 %).
    More tokens are multiplied by weights rounded to their dtype (bfloat16: 0.2 %), those of float32 by weights in
    float32. Sums are in float32.

    Args:
        x: (..., m) of one of `DTYPES` and any strides, on the weight's device.
        ready: from `prepare`.
        rows: n.
        exact: whether levels are not to be rounded, however few the tokens, but weights, to the dtype of x.

    Returns:
        (..., n) in the dtype of x.

    Raises:
        ValueError: x has another number of columns than the weight.
    """
    tensors, numbers = ready
    columns = numbers[1]
    reference.check_width(x, columns)
    y: Tensor = torch.ops.arbllm.triton_matmul(x.reshape(-1, columns).contiguous(), tensors, numbers, exact)
    return y.view(*x.shape[:-1], rows)


def matmul(x: Tensor, matrix: BinaryMatrix) -> Tensor:
    """Multiply by the packed weight, y = x W^T; the matrix is prepared anew each time.

    Args:
        x: (..., m) of any floating dtype and any strides; on another device than a GPU, where Triton is not, and in
            other dtypes than `DTYPES` the plain PyTorch kernel runs.
        matrix: the packed W (n, m), on the device of x.

    Returns:
        (..., n) in the dtype of x.
    """
    if not x.is_cuda or x.dtype not in DTYPES or not available():
        return reference.matmul(x, matrix)
    return multiply(x, prepare(matrix), matrix.layout.rows)


@cache
def _triton() -> ModuleType | None:
    if torch.version.hip is not None:
        reason = "the Triton kernel is written for NVIDIA's tensor cores"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        reason = f"the Triton kernel needs a GPU of compute capability {'.'.join(map(str, OLDEST))} or more"
    else:
        try:
            import_module("triton")
        except ImportError:
            reason = "Triton is not installed (pip install triton)"
        else:
            return import_module("arbllm.kernels.triton")
    warnings.warn(f"{reason}, so packed layers run on the slow PyTorch kernel", stacklevel=2)
    return None
