"""Which of the Triton kernels runs when, and how the work is divided among programs."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from arbllm.kernels import triton_matmul, triton_matvec
from arbllm.kernels.triton_configuration import Configuration, FewTokens, ManyTokens
from arbllm.kernels.triton_layout import Prepared
from arbllm.kernels.triton_plan import CHUNK, SINGLES_TOGETHER, WORD, Plan

GATHERED = 1024
"""Inputs of a token that are put in order at a time."""
WRITTEN = 8
"""Words of columns of a program that writes weights out."""
ALIGNED = 256
"""Rows are written out in multiples of this, so that products begin where the vendor's kernels can."""
SHARES = {1: 1, 2: 1, 4: 2, 8: 3}
"""By tokens times slots of a program, how many times fewer run side by side, for all the registers that they take."""
FEWEST = 2
"""Tokens times slots up to which a program may take more rows: of more, their sums would not fit."""
LEAST_SPAN = 8
"""Words whose inputs a program makes ready at once: there is a kernel for each power of two."""
LITTLE_SCRATCH = 2**20
"""Words of 64 bits for inputs that are no matter, however small the matrix."""
LEAST_TOKENS = 8
"""Of a product on tensor cores, which takes two bytes of each; fewer are padded to these."""


def multiply(x: Tensor, matrix: Prepared, configuration: Configuration, exact: bool = False) -> Tensor:
    """y = x W^T by the kernel that suits the number of tokens; x (tokens, m) is contiguous.

    Weights are written out for float32, which inputs of 16 bits would not do for, and where `exact` asks for it, if
    levels as bytes would not.
    """
    if x.dtype == torch.float32 or (exact and matrix.plan.layout.has_trellis):
        return multiply_dense(x, matrix, configuration)
    kernel = kernel_for(matrix.plan, configuration, len(x))
    if kernel == "few":
        return multiply_few(x, matrix, configuration.few)
    if kernel == "many":
        return multiply_many(x, matrix, configuration.many)
    return multiply_dense(x, matrix, configuration)


def kernel_for(plan: Plan, configuration: Configuration, tokens: int) -> str:
    """Which kernel multiplies so many tokens of 16 bits each: `few`, `many` or `dense`.

    Where segments are small and many, `few` would make more inputs ready than there are weights.
    """
    few, many = configuration.few, configuration.many
    if plan.all_trellis and many.least_tokens <= tokens <= many.most_tokens:
        return "many"
    if tokens <= few.most_tokens and scratch_words(plan, few, tokens) <= max(plan.layout.weights // 4, LITTLE_SCRATCH):
        return "few"
    return "many" if plan.all_trellis and tokens <= many.most_tokens else "dense"


def divide_all(plan: Plan, default: Configuration, device: torch.device) -> None:
    """Make all tables of work that products will ask for: no CUDA graph may record that they are made."""
    plan.units(WRITTEN, device)
    plan.chunk_table(device)
    shapes = [
        shape[part].get("most_tokens", 0) for shape in default.shapes for part in ("few", "many") if part in shape
    ]
    for tokens in range(1, max(default.few.most_tokens, default.many.most_tokens, *shapes, 0) + 1):
        configuration = default.of(plan.layout.rows, plan.layout.columns, tokens)
        kernel = kernel_for(plan, configuration, tokens)
        if kernel == "few":
            plan.units(divide_few(plan, configuration.few, tokens).most, device)
        elif kernel == "many":
            plan.spans(divide_many(plan, configuration.many, tokens).most, device)


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
def divide_few(plan: Plan, launch: FewTokens, tokens: int) -> Division:
    """The division of a product of a few tokens.

    Programs that wait for others to end wait for all that these wait for: of large matrices each takes more rows.
    """
    slots = triton.next_power_of_2(plan.most_slots)
    size = triton.next_power_of_2(min(tokens, max(launch.tokens // slots, 1)))
    blocks, rows = triton.cdiv(tokens, size), launch.rows
    programs = max(launch.programs // SHARES[min(size * slots, max(SHARES))], 1)
    least = blocks * sum(-(-band.words // launch.most_words) for band in plan.bands)
    while (
        size * slots <= FEWEST and rows < launch.most_rows and 2 * least * triton.cdiv(plan.height, rows) > 3 * programs
    ):
        rows *= 2
    places, words = triton.cdiv(plan.height, rows), words_aside(launch, rows)
    wanted = triton.cdiv(plan.single_start // WORD * blocks * places, programs)
    most = triton.cdiv(min(max(wanted, 1), launch.most_words), words) * words
    return Division(size, rows, blocks, places, most)


def span_of(plan: Plan, most: int) -> int:
    """Words that a program has place for, of at most so many."""
    return max(LEAST_SPAN, triton.next_power_of_2(min(most, plan.longest)))


@cache
def scratch_words(plan: Plan, launch: FewTokens, tokens: int) -> int:
    """Words of 64 bits for the inputs that all programs of a product of a few tokens make ready, each its own."""
    division = divide_few(plan, launch, tokens)
    units = sum(-(-band.words // division.most) for band in plan.bands) + -(-len(plan.singles) // SINGLES_TOGETHER)
    programs = division.blocks * division.places * units
    return programs * span_of(plan, division.most) * 8 * division.size * plan.most_slots


def words_aside(launch: FewTokens, rows: int) -> int:
    """Words that a program of so many rows reads side by side."""
    return max(1, launch.words * launch.rows // rows)


@cache
def divide_many(plan: Plan, launch: ManyTokens, tokens: int) -> Division:
    """The division of a product on tensor cores."""
    size = max(LEAST_TOKENS, triton.next_power_of_2(min(tokens, launch.tokens)))
    blocks, places = triton.cdiv(tokens, size), triton.cdiv(plan.height, launch.rows)
    most = max(1, triton.cdiv(plan.chunks * blocks * places, launch.programs))
    return Division(size, launch.rows, blocks, places, most)


def multiply_few(x: Tensor, matrix: Prepared, launch: FewTokens) -> Tensor:
    """y = x W^T, levels or signs times inputs four at a time."""
    plan, tokens, (rows, columns) = matrix.plan, len(x), (matrix.plan.layout.rows, matrix.plan.layout.columns)
    size, own, blocks, places, most = divide_few(plan, launch, tokens)
    units = plan.units(most, x.device)
    programs, split = blocks * places * len(units), len(units) > 1
    scratch = x.new_empty(scratch_words(plan, launch, tokens), dtype=torch.int64)
    scales = x.new_empty(programs * 2 * size * plan.most_slots, dtype=torch.float32)
    partial = x.new_empty(len(units) * tokens * rows if split else 1, dtype=torch.float32)
    counters = x.new_zeros(blocks * places, dtype=torch.int32) if split else x.new_empty(1, dtype=torch.int32)
    y = x.new_empty(tokens, rows)
    triton_matvec.few_tokens[(places, len(units), blocks)](
        x, matrix.words, matrix.order, matrix.factors, matrix.row_scales, matrix.row_means, units, matrix.levels,
        matrix.singles, scratch, scales, counters, partial, y,
        tokens, columns, rows, plan.height,
        **_flags(matrix), SLOTS=plan.most_slots, SPLIT=split, TOKENS=size, SPAN=span_of(plan, most), M=own,
        WORDS=words_aside(launch, own), **_early(launch), num_warps=launch.warps,
    )  # fmt: skip
    return y


def multiply_many(x: Tensor, matrix: Prepared, launch: ManyTokens) -> Tensor:
    """y = x W^T on tensor cores."""
    plan, tokens, (rows, columns) = matrix.plan, len(x), (matrix.plan.layout.rows, matrix.plan.layout.columns)
    size, _, blocks, places, most = divide_many(plan, launch, tokens)
    spans, chunk_table, padded = plan.spans(most, x.device), plan.chunk_table(x.device), blocks * size
    inputs = x.new_empty(plan.chunks * 2 * padded * CHUNK * WORD, dtype=torch.int8)
    norms = x.new_empty(plan.chunks * padded, dtype=torch.float32)
    totals = torch.empty_like(norms, dtype=torch.int32)
    counters = x.new_empty(blocks * places, dtype=torch.int32)
    triton_matmul.scale_inputs[(plan.chunks, padded)](
        x, matrix.order, matrix.factors, chunk_table, inputs, norms, totals, counters,
        tokens, padded, columns, len(counters),
        TOKENS=size, **_early(launch),
    )  # fmt: skip
    partial = x.new_empty(len(spans) * tokens * rows if len(spans) > 1 else 1, dtype=torch.float32)
    y = x.new_empty(tokens, rows)
    triton_matmul.many_tokens[(places, len(spans), blocks)](
        x, matrix.words.view(torch.int8), matrix.order, matrix.factors, matrix.row_scales, spans, chunk_table,
        matrix.levels, matrix.singles, inputs, norms, totals, counters, partial, y,
        tokens, padded, columns, rows, plan.height,
        KINDS=_kinds(plan), CODES=plan.layout.scale_bits == 8, SPLIT=len(spans) > 1, TOKENS=size, M=launch.rows,
        STAGES=launch.stages, **_early(launch), num_warps=launch.warps,
    )  # fmt: skip
    return y


def multiply_dense(x: Tensor, matrix: Prepared, configuration: Configuration) -> Tensor:
    """y = x W^T with pieces of the weight written out, levels as they are."""
    plan, launch, rows = matrix.plan, configuration.dense, matrix.plan.layout.rows
    width = len(matrix.order)
    xs = x.new_empty(len(x), width)
    triton_matmul.gather[(len(x),)](x, matrix.order, xs, x.shape[1], width, WIDTH=GATHERED)
    units = plan.units(WRITTEN, x.device)
    y = x.new_empty(len(x), rows)
    piece = max(launch.scratch_megabytes * 10**6 // (width * x.element_size()) // ALIGNED, 1) * ALIGNED
    scratch = x.new_empty(min(piece, rows), width)
    scratch[:, plan.single_start + len(matrix.singles) :] = 0
    for start in range(0, rows, piece):
        stop = min(start + piece, rows)
        dense = scratch[: stop - start]
        triton_matmul.dequantize[(triton.cdiv(stop - start, launch.rows), len(units))](
            matrix.words, matrix.factors, matrix.row_scales, matrix.row_means, units, matrix.exact_levels,
            matrix.singles, dense,
            start, stop, width, plan.height,
            **_flags(matrix), M=launch.rows, num_warps=launch.warps,
        )  # fmt: skip
        torch.mm(xs, dense.T, out=y[:, start:stop])
    return y


def _early(launch: FewTokens | ManyTokens) -> dict[str, bool]:
    return {"EARLY": True, "launch_pdl": True} if launch.early else {"EARLY": False}


def _kinds(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Kinds as Triton takes them."""
    return tuple(tuple(kind) for kind in plan.kinds)


def _flags(matrix: Prepared) -> dict[str, Any]:
    layout = matrix.plan.layout
    return {"KINDS": _kinds(matrix.plan), "CODES": layout.scale_bits == 8, "MEANS": layout.row_means}
