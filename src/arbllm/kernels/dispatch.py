"""The registry of kernels, and the choice among them. A new kernel is one file, one entry, one test."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from arbllm.errors import ConfigError
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import cpu, cuda, reference
from arbllm.kernels.modes import is_followed

Kernel = Callable[[Tensor, BinaryMatrix], Tensor]

KERNELS: dict[str, Kernel] = {"reference": reference.matmul, "cpu": cpu.matmul, "cuda": cuda.matmul}
"""Name -> kernel(x (..., m), matrix (n, m)) -> (..., n) in the dtype of x."""


def get_kernel(name: str) -> Kernel:
    """The kernel of this name.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    if name not in KERNELS:
        raise ConfigError(f"kernel {name!r} is unknown; choose one of {', '.join(KERNELS)}")
    return KERNELS[name]


def preparing_kernel(x: Tensor) -> ModuleType | None:
    """The kernel that multiplies x by a weight that was prepared for it: `cpu` or `cuda`, whose caller keeps that.

    It has `prepare(matrix)` and `multiply(x, prepared, rows, exact=...)`. None where x is multiplied by the packed
    weight itself (`reference.matmul`): if x is of float64, needs a gradient or is followed (see
    `modes.is_followed`), or if the kernel is not installed.

    Raises:
        ConfigError: `torch.jit.trace` follows.
    """
    if x.dtype == torch.float64 or (x.requires_grad and torch.is_grad_enabled()) or is_followed():
        return None
    if x.is_cpu:
        return cpu if cpu.available() else None
    return cuda if x.is_cuda and x.dtype in cuda.DTYPES and cuda.available() else None
