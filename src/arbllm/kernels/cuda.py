"""What runs on a GPU: the Triton kernel where Triton is installed, else the plain PyTorch one, which is said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import reference


def matmul(x: Tensor, matrix: BinaryMatrix) -> Tensor:
    """Multiply by the packed weight, y = x W^T: x (..., m), result (..., n) in its dtype."""
    return _kernel()(x, matrix)


@torch.compiler.assume_constant_result
@cache
def _kernel() -> Callable[[Tensor, BinaryMatrix], Tensor]:
    try:
        import_module("triton")
    except ImportError:
        warnings.warn(
            "Triton is not installed: packed layers run on the slow PyTorch kernel; pip install arbllm[gpu]",
            stacklevel=2,
        )
        return reference.matmul
    return import_module("arbllm.kernels.triton").matmul
