"""The registry of kernels, and the choice among them. A new kernel is one file, one entry, one test."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from arbllm.errors import ConfigError
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import cuda, reference

Kernel = Callable[[Tensor, BinaryMatrix], Tensor]

KERNELS: dict[str, Kernel] = {"reference": reference.matmul, "cuda": cuda.matmul}
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
