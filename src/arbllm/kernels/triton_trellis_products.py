"""Which of the kernels for a matrix with a trellis runs when, and how the work is divided among programs."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from arbllm.kernels import triton_trellis_matmul, triton_trellis_matvec
from arbllm.kernels.triton_configuration import Configuration, TrellisFew, TrellisMany
from arbllm.kernels.triton_trellis_layout import CHUNK, WORD, PreparedTrellis, TrellisPlan

GATHERED = 1024
"""Inputs of a token that are put in order at a time."""
WRITTEN = 8
"""Words of columns of a program that writes weights out."""
ALIGNED = 256
"""Rows are written out in multiples of this, so that products begin where the vendor's kernels can."""
SHARES = {1: 1, 2: 1, 4: 2, 8: 3}
"""By the tokens of a program, how many times fewer run side by side, for all the registers that they take."""
FEWEST = 2
"""Tokens up to which a program may take more rows: of more, their sums would not fit."""
LEAST_SPAN = 16
"""Words whose inputs a program makes ready at once: there is a kernel for each power of two."""
LEAST_TOKENS = 8
"""Of a product on tensor cores, which takes two bytes of each; fewer are padded to these."""


def multiply(x: Tensor, matrix: PreparedTrellis, configuration: Configuration, exact: bool = False) -> Tensor:
    """y = x W^T by the kernel that suits the number of tokens; x (tokens, m) is contiguous.

    Of float32, or where `exact` asks for it, weights are written out, since levels as bytes would not do.
    """
    if exact or x.dtype == torch.float32 or len(x) > configuration.trellis_many.most_tokens:
        y = multiply_dense(x, matrix, configuration)
    elif len(x) <= configuration.trellis_few.most_tokens:
        y = multiply_few(x, matrix, configuration.trellis_few)
    else:
        y = multiply_many(x, matrix, configuration.trellis_many)
    if matrix.others.numel():
        with torch.autocast(x.device.type, enabled=False):
            y = (y.float() + x[:, matrix.other_columns].float() @ matrix.others.T).to(x.dtype)
    return y


def make_units(plan: TrellisPlan, default: Configuration, device: torch.device) -> None:
    """Make all that work can be divided into: it stays, so no CUDA graph may record that it is made."""
    plan.units(WRITTEN, device)
    plan.chunk_table(device)
    most = [shape.get("trellis_many", {}).get("most_tokens", 0) for shape in default.shapes]
    for tokens in range(1, max(default.trellis_many.most_tokens, *most, 0) + 1):
        launch = default.of(plan.layout.rows, plan.layout.columns, tokens)
        if tokens <= launch.trellis_few.most_tokens:
            plan.units(divide_few(plan, launch.trellis_few, tokens).most, device)
        elif tokens <= launch.trellis_many.most_tokens:
            plan.spans(divide_many(plan, launch.trellis_many, tokens).most, device)


class Division(NamedTuple):
    """How a product is divided among programs.

    Attributes:
        size: tokens of a program.
        rows: of a program.
        blocks: of tokens.
        places: of rows.
        most: words or chunks of columns of a program, about.
    """

    size: int
    rows: int
    blocks: int
    places: int
    most: int


@cache
def divide_few(plan: TrellisPlan, launch: TrellisFew, tokens: int) -> Division:
    """The division of a product of a few tokens.

    Programs that wait for others to end wait for all that these wait for: of large matrices each takes more rows.
    """
    size = triton.next_power_of_2(min(tokens, launch.tokens))
    blocks, rows, programs = triton.cdiv(tokens, size), launch.rows, launch.programs // SHARES[min(size, max(SHARES))]
    least = blocks * sum(-(-band.words // launch.most_words) for band in plan.bands)
    while size <= FEWEST and rows < launch.most_rows and 2 * least * triton.cdiv(plan.height, rows) > 3 * programs:
        rows *= 2
    places, words = triton.cdiv(plan.height, rows), words_aside(launch, rows)
    wanted = triton.cdiv(plan.single_start // WORD * blocks * places, programs)
    most = triton.cdiv(min(max(wanted, 1), launch.most_words), words) * words
    return Division(size, rows, blocks, places, most)


def words_aside(launch: TrellisFew, rows: int) -> int:
    """Words that a program of so many rows reads side by side."""
    return max(1, launch.words * launch.rows // rows)


@cache
def divide_many(plan: TrellisPlan, launch: TrellisMany, tokens: int) -> Division:
    """The division of a product on tensor cores."""
    size = max(LEAST_TOKENS, triton.next_power_of_2(min(tokens, launch.tokens)))
    blocks, places = triton.cdiv(tokens, size), triton.cdiv(plan.height, launch.rows)
    most = max(1, triton.cdiv(plan.chunks * blocks * places, launch.programs))
    return Division(size, launch.rows, blocks, places, most)


def multiply_few(x: Tensor, matrix: PreparedTrellis, launch: TrellisFew) -> Tensor:
    """y = x W^T, levels times inputs four at a time."""
    plan, tokens, (rows, columns) = matrix.plan, len(x), (matrix.plan.layout.rows, matrix.plan.layout.columns)
    size, height, blocks, places, most = divide_few(plan, launch, tokens)
    units, span = plan.units(most, x.device), max(LEAST_SPAN, triton.next_power_of_2(most))
    programs = blocks * places * len(units)
    scratch = x.new_empty(programs * span * 8 * size, dtype=torch.int64)
    scales = x.new_empty(programs * 2 * size, dtype=torch.float32)
    partial = x.new_empty(len(units) * tokens * rows if len(units) > 1 else 1, dtype=torch.float32)
    counters = x.new_zeros(blocks * places, dtype=torch.int32)
    y = x.new_empty(tokens, rows)
    triton_trellis_matvec.few_tokens[(places, len(units), blocks)](
        x, matrix.words, matrix.order, matrix.factors, matrix.row_scales, units, matrix.levels, matrix.singles,
        scratch, scales, counters, partial, y,
        tokens, columns, rows, plan.height,
        KINDS=plan.kinds, CODES=_codes(matrix), SPLIT=len(units) > 1, TOKENS=size, SPAN=span, M=height,
        WORDS=words_aside(launch, height), **_early(launch), num_warps=launch.warps,
    )  # fmt: skip
    return y


def multiply_many(x: Tensor, matrix: PreparedTrellis, launch: TrellisMany) -> Tensor:
    """y = x W^T on tensor cores."""
    plan, tokens, (rows, columns) = matrix.plan, len(x), (matrix.plan.layout.rows, matrix.plan.layout.columns)
    size, _, blocks, places, most = divide_many(plan, launch, tokens)
    spans, chunk_table, padded = plan.spans(most, x.device), plan.chunk_table(x.device), blocks * size
    inputs = x.new_empty(plan.chunks * 2 * padded * CHUNK * WORD, dtype=torch.int8)
    norms = x.new_empty(plan.chunks * padded, dtype=torch.float32)
    totals = torch.empty_like(norms, dtype=torch.int32)
    counters = x.new_empty(blocks * places, dtype=torch.int32)
    triton_trellis_matmul.scale_inputs[(plan.chunks, padded)](
        x, matrix.order, matrix.factors, chunk_table, inputs, norms, totals, counters,
        tokens, padded, columns, len(counters),
        TOKENS=size, **_early(launch),
    )  # fmt: skip
    partial = x.new_empty(len(spans) * tokens * rows if len(spans) > 1 else 1, dtype=torch.float32)
    y = x.new_empty(tokens, rows)
    triton_trellis_matmul.many_tokens[(places, len(spans), blocks)](
        x, matrix.words.view(torch.int8), matrix.order, matrix.factors, matrix.row_scales, spans, chunk_table,
        matrix.levels, matrix.singles, inputs, norms, totals, counters, partial, y,
        tokens, padded, columns, rows, plan.height,
        KINDS=plan.kinds, CODES=_codes(matrix), SPLIT=len(spans) > 1, TOKENS=size, M=launch.rows,
        STAGES=launch.stages, **_early(launch), num_warps=launch.warps,
    )  # fmt: skip
    return y


def multiply_dense(x: Tensor, matrix: PreparedTrellis, configuration: Configuration) -> Tensor:
    """y = x W^T with pieces of the weight written out, levels as they are."""
    plan, launch, rows = matrix.plan, configuration.dense, matrix.plan.layout.rows
    width = len(matrix.order)
    xs = x.new_empty(len(x), width)
    triton_trellis_matmul.gather[(len(x),)](x, matrix.order, xs, x.shape[1], width, WIDTH=GATHERED)
    units = plan.units(WRITTEN, x.device)
    y = x.new_empty(len(x), rows)
    piece = max(launch.scratch_megabytes * 10**6 // (width * x.element_size()) // ALIGNED, 1) * ALIGNED
    scratch = x.new_empty(min(piece, rows), width)
    scratch[:, plan.single_start + len(matrix.singles) :] = 0
    for start in range(0, rows, piece):
        stop = min(start + piece, rows)
        dense = scratch[: stop - start]
        triton_trellis_matmul.dequantize[(triton.cdiv(stop - start, launch.rows), len(units))](
            matrix.words, matrix.factors, matrix.row_scales, units, matrix.exact_levels, matrix.singles, dense,
            start, stop, width, plan.height,
            KINDS=plan.kinds, CODES=_codes(matrix), M=launch.rows, num_warps=launch.warps,
        )  # fmt: skip
        torch.mm(xs, dense.T, out=y[:, start:stop])
    return y


def _early(launch: TrellisFew | TrellisMany) -> dict[str, bool]:
    return {"EARLY": True, "launch_pdl": True} if launch.early else {"EARLY": False}


def _codes(matrix: PreparedTrellis) -> bool:
    return matrix.plan.layout.scale_bits == 8
