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
    """Multiply by the packed weight: y = x W^T.

    Args:
        x: (..., m) of any floating dtype and any strides; on another device than a GPU the plain PyTorch kernel runs.
        matrix: the packed W (n, m), on the device of x.

    Returns:
        (..., n) in the dtype of x.
    """
    return (_kernel() if x.is_cuda else reference.matmul)(x, matrix)


@torch.compiler.assume_constant_result
@cache
def _kernel() -> Callable[[Tensor, BinaryMatrix], Tensor]:
    if torch.version.hip is None:
        try:
            import_module("triton")
        except ImportError:
            reason = "Triton is not installed (pip install arbllm[gpu])"
        else:
            return import_module("arbllm.kernels.triton").matmul
    else:
        reason = "the Triton kernel is written for NVIDIA's tensor cores"
    warnings.warn(f"{reason}, so packed layers run on the slow PyTorch kernel", stacklevel=2)
    return reference.matmul
