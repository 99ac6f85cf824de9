"""The Triton kernel behind PyTorch: the operator `arbllm::triton_matmul`, and which of its kernels runs when.

Up to some 16 tokens products are taken straight from the bits (`triton_matvec`); up to some hundreds, weights are made
in registers (`triton_matmul`); beyond, they are written out in pieces for the vendor's matrix product. Matrices with a
trellis have kernels of their own (`triton_trellis_products`). With TRITON_INTERPRET=1 in the environment before the
first import everything runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from arbllm.format.layout import ORDERINGS, Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import (
    cuda,
    triton_configuration,
    triton_layout,
    triton_matmul,
    triton_matvec,
    triton_trellis_layout,
    triton_trellis_products,
)
from arbllm.kernels.triton_configuration import Configuration, FewTokens, ManyTokens
from arbllm.kernels.triton_layout import Prepared
from arbllm.kernels.triton_plan import CHUNK, ROWS_OF_A_WORD, SINGLES, Plan, plan_of, tiles_of

SLICE = 8
"""Columns of inputs that one program scales; products with fewer are padded to these."""
LEAST_CHUNKS = 8
"""Chunks of columns that are worth a program."""
THREADS_OF_A_WARP = 32
PARTS = {torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}
"""Numbers of 16 bits that stand for an input."""


def prepare(matrix: BinaryMatrix) -> cuda.Ready:
    """A matrix as the kernels read it, on the same device, of about the size of the packed tensors."""
    numbers = _numbers(matrix.layout)
    if matrix.layout.has_trellis:
        plan, device = triton_trellis_layout.plan_of(matrix.layout), matrix.signs.device
        triton_trellis_products.make_units(plan, configuration_of(device), device)
        return triton_trellis_layout.prepare(matrix).tensors, numbers
    _make_units(tuple(numbers), matrix.signs.device)
    return triton_layout.prepare(matrix).tensors, numbers


@cache
def _make_units(numbers: tuple[int, ...], device: torch.device) -> None:
    """Make all that work can be divided into: it stays, so no CUDA graph may record that it is made."""
    plan, default = plan_of(_layout_of(numbers)), configuration_of(device)
    for tokens in range(1, default.many.most_tokens + 1):
        configuration = default.of(numbers[0], numbers[1], tokens)
        if tokens <= configuration.few.most_tokens:
            for parts in set(PARTS.values()):
                plan.units(_divide_few(plan, configuration.few, tokens, parts).chunks, device)
        else:
            plan.units(_divide_many(plan, configuration.many, tokens)[-1], device)


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
def _layout_of(numbers: tuple[int, ...]) -> Layout:
    return _layout(numbers)


@torch.library.custom_op("arbllm::triton_matmul", mutates_args=())
def triton_matmul_operator(x: Tensor, tensors: list[Tensor], numbers: list[int], exact: bool) -> Tensor:
    """y = x W^T.

    Args:
        x: contiguous, (tokens, m), one of `cuda.DTYPES`.
        tensors: of `Prepared`, or with a trellis of `PreparedTrellis`, in its order.
        numbers: of the layout.
        exact: whether levels of a trellis are not to be rounded to 8 bits.
    """
    if not len(x):
        return x.new_empty(0, numbers[0])
    configuration = configuration_of(x.device).of(numbers[0], numbers[1], len(x))
    layout = _layout_of(tuple(numbers))
    with _on(x.device):
        if layout.has_trellis:
            trellis = triton_trellis_layout.PreparedTrellis(triton_trellis_layout.plan_of(layout), *tensors)
            return triton_trellis_products.multiply(x, trellis, configuration, exact)
        return multiply_prepared(x, Prepared(plan_of(layout), *tensors), configuration)


@triton_matmul_operator.register_fake
def _(x: Tensor, tensors: list[Tensor], numbers: list[int], exact: bool) -> Tensor:
    return x.new_empty(x.shape[0], numbers[0])


@cache
def configuration_of(device: torch.device) -> Configuration:
    """How kernels are launched on a device."""
    return triton_configuration.load(torch.cuda.get_device_name(device) if device.type == "cuda" else "any")


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def multiply_prepared(x: Tensor, matrix: Prepared, configuration: Configuration) -> Tensor:
    """y = x W^T by the kernel that suits the number of tokens; x (tokens, m) is contiguous."""
    if len(x) <= configuration.few.most_tokens:
        return multiply_few(x, matrix, configuration)
    xs = x.index_select(1, matrix.order)
    return (multiply_many if len(x) <= configuration.many.most_tokens else multiply_dense)(xs, matrix, configuration)


def multiply_few(x: Tensor, matrix: Prepared, configuration: Configuration) -> Tensor:
    """y = x W^T straight from the bits."""
    plan, launch, tokens = matrix.plan, configuration.few, len(x)
    layout, parts = plan.layout, PARTS[x.dtype]
    size, width, blocks, places, chunks = _divide_few(plan, launch, tokens, parts)
    units = plan.units(chunks, x.device)
    runs, most_tiles = len(plan.runs), max((tiles_of(layout, kind) for kind in plan.kinds), default=1)
    z = x.new_empty(blocks * plan.tiles * CHUNK * width, dtype=torch.float16)
    norms, sums = x.new_empty(2, max(blocks * runs * most_tiles * width, 1), dtype=torch.float32)
    counters = x.new_empty(blocks * places, dtype=torch.int32)
    addends = x.new_empty(len(units) * tokens * layout.rows if len(units) > 1 else 1, dtype=torch.float32)
    y = x.new_empty(tokens, layout.rows)
    flags = {**_flags(matrix), "PARTS": parts, "MOST_TILES": most_tiles, "TOKENS": size, "N": width}
    span = triton.next_power_of_2(max((run.chunks for run in plan.runs), default=1))
    triton_matvec.scale_inputs[(max(runs, 1), most_tiles, blocks * (width // SLICE))](
        x, matrix.order, matrix.column_scales, matrix.steps, matrix.run_table, z, norms, sums, counters,
        runs, plan.tiles, tokens, layout.columns, places, SLICE=SLICE, SPAN=span, **flags,
    )  # fmt: skip
    triton_matvec.few_tokens[(places, len(units), blocks)](
        x, matrix.words, z, norms, sums, matrix.row_scales, matrix.row_means, matrix.run_table, units,
        matrix.singles, matrix.single_columns, matrix.column_scales, matrix.steps, addends, counters, y,
        runs, plan.tiles, tokens, layout.columns, layout.rows, plan.quarter, len(matrix.singles),
        KINDS=_kinds(matrix), SPLIT=len(units) > 1, M=launch.rows, WORDS=launch.words,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers, **flags,
    )  # fmt: skip
    return y


def multiply_many(xs: Tensor, matrix: Prepared, configuration: Configuration) -> Tensor:
    """y = x W^T with weights made in registers; xs (tokens, columns) is in the order of `Prepared.order`."""
    plan, launch, tokens = matrix.plan, configuration.many, len(xs)
    blocks, places, chunks = _divide_many(plan, launch, tokens)
    units = plan.units(chunks, xs.device)
    split = len(units) > 1
    counters = torch.zeros(blocks * places if split else 1, dtype=torch.int32, device=xs.device)
    addends = xs.new_empty(len(units) * tokens * plan.layout.rows if split else 1, dtype=torch.float32)
    y = xs.new_empty(tokens, plan.layout.rows)
    triton_matmul.many_tokens[(places, len(units), blocks)](
        xs, matrix.words, matrix.row_scales, matrix.row_means, matrix.run_table, units,
        matrix.singles, matrix.single_columns, matrix.column_scales, matrix.steps, addends, counters, y,
        tokens, xs.shape[1], plan.single_start, plan.layout.rows, plan.quarter, len(matrix.singles),
        KINDS=_kinds(matrix), SPLIT=split, PRECISION="tf32x3" if xs.dtype == torch.float32 else "tf32",
        TOKENS=launch.tokens, M=launch.rows, WORDS=launch.words,
        num_warps=launch.warps, num_stages=launch.stages, **_flags(matrix),
    )  # fmt: skip
    return y


def multiply_dense(xs: Tensor, matrix: Prepared, configuration: Configuration) -> Tensor:
    """y = x W^T with pieces of the weight written out; xs as in `multiply_many`."""
    plan, launch, quarter = matrix.plan, configuration.dense, matrix.plan.quarter
    columns = xs.shape[1]
    piece = max(1, min(quarter, launch.scratch_megabytes * 10**6 // (4 * columns * xs.element_size())))
    y = xs.new_empty(len(xs), 4 * quarter)
    quarters = y.view(len(xs), 4, quarter)
    for start in range(0, quarter, piece):
        piece = min(piece, quarter - start)
        dense = xs.new_empty(4 * piece, columns)
        grid = triton.cdiv(piece, launch.rows), len(plan.runs) + triton.cdiv(len(matrix.singles), SINGLES)
        triton_matmul.dequantize[grid](
            matrix.words, matrix.row_scales, matrix.row_means, matrix.run_table,
            matrix.singles, matrix.single_columns, matrix.column_scales, matrix.steps, dense,
            start, piece, len(plan.runs), columns, plan.single_start, plan.layout.rows, quarter, len(matrix.singles),
            KINDS=_kinds(matrix), M=launch.rows, num_warps=launch.warps, **_flags(matrix),
        )  # fmt: skip
        quarters[:, :, start : start + piece] = (xs @ dense.T).view(len(xs), 4, piece)
    return y[:, : plan.layout.rows].contiguous()


class _Division(NamedTuple):
    """How a product of a few tokens is divided among programs.

    Attributes:
        size: tokens of a program.
        width: columns of inputs that it has for them.
        blocks: of tokens.
        places: of rows.
        chunks: of columns of a program, about.
    """

    size: int
    width: int
    blocks: int
    places: int
    chunks: int


def _divide_few(plan: Plan, launch: FewTokens, tokens: int, parts: int) -> _Division:
    layout = plan.layout
    most = max((kind.groups for kind in plan.kinds), default=1) if layout.column_scaled else 1
    planes = max((groups * terms + layout.row_means * (groups - 1) for groups, terms in plan.kinds), default=1)
    size = _tokens_at_a_time(tokens, most * parts, planes, launch)
    blocks, places = triton.cdiv(tokens, size), triton.cdiv(plan.quarter, launch.rows)
    chunks = _chunks(plan, launch.programs, places * blocks)
    return _Division(size, max(SLICE, size * most * parts), blocks, places, chunks)


def _divide_many(plan: Plan, launch: ManyTokens, tokens: int) -> tuple[int, int, int]:
    """Blocks of tokens, places of rows, and about how many chunks of columns a program has."""
    blocks, places = triton.cdiv(tokens, launch.tokens), triton.cdiv(plan.quarter, launch.rows)
    return blocks, places, _chunks(plan, launch.programs, places * blocks)


def _tokens_at_a_time(tokens: int, columns: int, planes: int, launch: FewTokens) -> int:
    """Tokens of a program, a power of two, each of which takes some columns of inputs: as many as registers hold."""
    registers = ROWS_OF_A_WORD * planes * launch.rows / (THREADS_OF_A_WARP * launch.warps)
    widest = max(SLICE, launch.accumulators / registers)
    size = 1
    while size < tokens and 2 * size * columns <= widest:
        size *= 2
    return size


def _chunks(plan: Plan, programs: int, others: int) -> int:
    """Chunks of columns for each program so that there are about so many, if there are `others` for each."""
    wanted = max(1, programs // others)
    return max(LEAST_CHUNKS, triton.cdiv(triton.cdiv(plan.columns, CHUNK), wanted))


def _kinds(matrix: Prepared) -> tuple[tuple[int, ...], ...]:
    """Kinds as Triton takes them."""
    return tuple(tuple(kind) for kind in matrix.plan.kinds)


def _flags(matrix: Prepared) -> dict[str, bool]:
    layout = matrix.plan.layout
    return {"SCALED": layout.column_scaled, "CODES": layout.scale_bits == 8, "MEANS": layout.row_means}
