"""The registry of kernels, and the choice among them. A new kernel is one file, one entry, one test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arbllm.errors import ConfigError
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import cpu, cuda, reference

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


def matmul(x: Tensor, matrix: BinaryMatrix) -> Tensor:
    """Multiply by the packed weight, y = x W^T, with the kernel that suits its device.

    Args:
        x: (..., m) of any floating dtype and any strides.
        matrix: the packed W (n, m), on the device of x.

    Returns:
        (..., n) in the dtype of x.
    """
    return get_kernel("cuda" if x.is_cuda else "reference")(x, matrix)


def takes_prepared(x: Tensor) -> bool:
    """Whether x is multiplied by a weight prepared for the CPU (`cpu.multiply`); a caller keeps what it prepared.

    So is every x on the CPU, except one of float64 and one that needs a gradient.
    """
    return (
        x.is_cpu and x.dtype != torch.float64 and not (x.requires_grad and torch.is_grad_enabled()) and cpu.available()
    )
