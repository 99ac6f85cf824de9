"""The Triton kernels behind PyTorch: the operator `arbllm::triton_matmul`.

A few tokens are multiplied straight from the bits (`triton_matvec`), with a trellis up to some hundreds by bytes of its
levels on tensor cores (`triton_matmul`); for more, weights are written out in pieces for the vendor's matrix product.
With TRITON_INTERPRET=1 in the environment before the first import everything runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from arbllm.format.layout import ORDERINGS, Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import cuda, triton_configuration, triton_layout, triton_products
from arbllm.kernels.triton_configuration import Configuration
from arbllm.kernels.triton_plan import Plan, plan_of


def prepare(matrix: BinaryMatrix) -> cuda.Ready:
    """A matrix as the kernels read it, on the same device, of about the size of the packed tensors."""
    device = matrix.signs.device
    triton_products.divide_all(plan_of(matrix.layout), configuration_of(device), device)
    return triton_layout.prepare(matrix).tensors, _numbers(matrix.layout)


def _numbers(layout: Layout) -> list[int]:
    """A layout in whole numbers, which an operator can take."""
    numbers = [layout.rows, layout.columns, ORDERINGS.index(layout.ordering), layout.block_size, layout.scale_bits]
    numbers += [int(layout.row_means), int(layout.column_scaled)]
    return numbers + [int(number) for segment in layout.segments for number in segment]


def _layout(numbers: Sequence[int]) -> Layout:
    rows, columns, ordering, block_size, scale_bits, row_means, column_scaled, *segments = numbers
    fields = zip(*(segments[field::4] for field in range(4)), strict=True)
    return Layout(
        rows=rows,
        columns=columns,
        segments=tuple(Segment(width, groups, terms, bool(trellis)) for width, groups, terms, trellis in fields),
        ordering=ORDERINGS[ordering],
        block_size=block_size,
        scale_bits=scale_bits,
        row_means=bool(row_means),
        column_scaled=bool(column_scaled),
    )


@cache
def _plan(numbers: tuple[int, ...]) -> Plan:
    return plan_of(_layout(numbers))


@torch.library.custom_op("arbllm::triton_matmul", mutates_args=())
def triton_matmul_operator(x: Tensor, tensors: list[Tensor], numbers: list[int], exact: bool) -> Tensor:
    """y = x W^T.

    Args:
        x: contiguous, (tokens, m), one of `cuda.DTYPES`.
        tensors: of `Prepared`, in its order.
        numbers: of the layout.
        exact: whether levels of a trellis are not to be rounded to 8 bits.
    """
    if not len(x):
        return x.new_empty(0, numbers[0])
    configuration = configuration_of(x.device).of(numbers[0], numbers[1], len(x))
    prepared = triton_layout.Prepared(_plan(tuple(numbers)), *tensors)
    with _on(x.device):
        return triton_products.multiply(x, prepared, configuration, exact)


@triton_matmul_operator.register_fake
def _(x: Tensor, tensors: list[Tensor], numbers: list[int], exact: bool) -> Tensor:
    return x.new_empty(x.shape[0], numbers[0])


@cache
def configuration_of(device: torch.device) -> Configuration:
    """How kernels are launched on a device."""
    return triton_configuration.load(torch.cuda.get_device_name(device) if device.type == "cuda" else "any")


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
