"""Triton kernels for many tokens times a matrix with a trellis: bytes on tensor cores, or weights written out.

Levels and inputs are bytes as in `triton_trellis_matvec`; weights that are written out have levels as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.triton_parts import INTERPRETED, scale_values
from arbllm.kernels.triton_trellis_levels import level_unit, quads
from arbllm.kernels.triton_trellis_parts import (
    BEFORE,
    CHUNK,
    COLUMNS,
    FIELDS,
    RUN_CHUNK,
    RUN_COLUMN,
    RUN_SEGMENT,
    RUN_START,
    RUN_WORDS,
    SINGLES,
    UNIT,
    add_up,
    loaded,
    single_weight,
    unit_fields,
    whole_numbers,
    whole_words,
)


@triton.jit(do_not_specialize=["tokens"])
def scale_inputs(
    x, order, factors, run_table, bytes_of_inputs, norms, totals,
    tokens, padded, columns,
    TOKENS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Inputs of one token and run as whole numbers, for `many_tokens`: program (run, token).

    Bytes: for each run (blocks of tokens, chunks, quads of a word, upper and lower bytes, tokens, columns of these
    quads in a chunk); what one stands for and sums: (runs, padded tokens).
    """
    run, token = tl.program_id(0), tl.program_id(1)
    fields = run_table + run * FIELDS
    column = tl.arange(0, SPAN * COLUMNS)
    words = tl.load(fields + RUN_WORDS)
    inside = (column < words * COLUMNS) & (token < tokens)
    start = tl.multiple_of(tl.load(fields + RUN_COLUMN), COLUMNS) + column
    natural = tl.load(order + start, mask=inside, other=0)
    value = tl.load(x + token.to(tl.int64) * columns + natural, mask=inside, other=0).to(tl.float32)
    value *= tl.load(factors + start, mask=inside, other=0)
    whole, norm, total = whole_numbers(value[None, :])
    whole = tl.reshape(whole, (SPAN * COLUMNS,))
    upper = (whole + 128) >> 8
    word, quad = column // COLUMNS, column % COLUMNS // 4
    chunks = (words + CHUNK - 1) // CHUNK
    first = tl.load(fields + RUN_CHUNK) * (padded // TOKENS) + token // TOKENS * chunks
    place = ((first.to(tl.int64) + word // CHUNK) * 8 + quad) * (2 * TOKENS) + token % TOKENS
    into = bytes_of_inputs + place * 32 + word % CHUNK * 4 + column % 4
    there = column < chunks * CHUNK * COLUMNS
    tl.store(into, upper.to(tl.int8), mask=there)
    tl.store(into + TOKENS * 32, (whole - (upper << 8)).to(tl.int8), mask=there)
    where = run * padded + token + tl.arange(0, 1)
    tl.store(norms + where, norm)
    tl.store(totals + where, total)


@triton.jit
def _chunk(place, height, count, m, levels, TERMS: tl.constexpr):
    """The quads of a chunk of `count` words as operands of tensor cores: a tuple of int8 (M, 32)."""
    size = TERMS * height + BEFORE
    there = (m < height)[:, None]
    if INTERPRETED:
        w = tl.arange(0, 8)[None, :]
        signs = place.to(tl.pointer_type(tl.int32)) + m[:, None] + w * size
        found = loaded(signs, height, there & (w < count), TERMS, 1)
        result = ()
        for quad in quads(found, levels, TERMS, False):
            parts = (quad[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
            result = result + (tl.reshape(parts, (quad.shape[0], 32)).to(tl.int8),)
        return result
    else:
        k = tl.arange(0, 32)[None, :]
        found = loaded(
            place + (4 * m)[:, None] + (k // 4 * (4 * size) + k % 4), height, there & (k // 4 < count), TERMS, 4
        )
        return quads(found, levels, TERMS, True)


@triton.jit
def _run_of_many(
    words, inputs, norms, totals, row_scales, run_table, levels, run, outputs, block, padded, height, m,
    TERMS: tl.constexpr, CODES: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`outputs` (M, TOKENS) with the products of one run added."""
    fields = run_table + run * FIELDS
    count = tl.load(fields + RUN_WORDS)
    place = words + (tl.load(fields + RUN_START).to(tl.int64) * UNIT + BEFORE) * 4
    k, n = tl.arange(0, 32), tl.arange(0, 2 * TOKENS)
    first = (tl.load(fields + RUN_CHUNK) * (padded // TOKENS) + block * tl.cdiv(count, CHUNK)).to(tl.int64)
    source = inputs + first * (8 * 32 * 2 * TOKENS) + n[:, None] * 32 + k[None, :]
    sums = tl.zeros((M, 2 * TOKENS), tl.int32)
    for word in tl.range(0, count, CHUNK, num_stages=STAGES):
        found = _chunk(place, height, count - word, m, levels, TERMS)
        for q in tl.static_range(8):
            sums = tl.dot(found[q], tl.trans(tl.load(source + q * (2 * TOKENS * 32))), sums, out_dtype=tl.int32)
        place += CHUNK * 4 * (TERMS * height + BEFORE)
        source += 8 * 32 * 2 * TOKENS
    scale = tl.load(row_scales + tl.load(fields + RUN_SEGMENT) * height + m, mask=m < height, other=0)
    scale = scale_values(scale, CODES) * level_unit(TERMS)
    t = run * padded + block * TOKENS + n % TOKENS
    norm = tl.load(norms + t) * tl.where(n < TOKENS, 256.0, 1.0)
    total = tl.load(totals + t) * tl.where(n < TOKENS, 0.0, 0.5)
    both = norm[None, :] * (sums.to(tl.float32) + total[None, :])  # of upper bytes, then of lower ones
    return outputs + scale[:, None] * tl.sum(tl.reshape(both, (M, 2, TOKENS)), 1)


@triton.jit
def _singles_of_many(
    x, singles, order, factors, first, last, tokens, columns, height, m, token,
    CODES: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """(M, TOKENS): the products of columns with a scale for each weight."""
    column = first + tl.arange(0, SINGLES)
    there = column < last
    place = singles + column.to(tl.int64)[None, :] * height + m[:, None]
    weight = single_weight(place, there[None, :] & (m < height)[:, None], CODES)
    natural, factor = tl.load(order + column), tl.load(factors + column)
    wanted = there[:, None] & (token < tokens)[None, :]
    value = tl.load(x + token.to(tl.int64)[None, :] * columns + natural[:, None], mask=wanted, other=0).to(tl.float32)
    return tl.dot(weight, value * factor[:, None], input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def many_tokens(
    x, words, order, factors, row_scales, run_table, groups, levels, singles, inputs, norms, totals, counters, partial,
    y,
    tokens, padded, columns, rows, height, single_start,
    KINDS: tl.constexpr, CODES: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y = x W^T for a block of tokens, M rows and some runs, on tensor cores; inputs are those of `scale_inputs`.

    `words` are bytes here.
    """
    place, unit, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, t = place * M + tl.arange(0, M), block * TOKENS + tl.arange(0, TOKENS)
    kind, first, last = tl.load(groups + 3 * unit), tl.load(groups + 3 * unit + 1), tl.load(groups + 3 * unit + 2)
    into = partial + unit.to(tl.int64) * tokens * rows if SPLIT else y
    wanted = (m < rows)[:, None] & (t < tokens)[None, :]
    offsets = t.to(tl.int64)[None, :] * rows + m[:, None]
    into += offsets
    for number in tl.static_range(len(KINDS)):
        if kind == number:
            outputs = tl.zeros((M, TOKENS), tl.float32)
            for run in range(first, last):
                outputs = _run_of_many(
                    words, inputs, norms, totals, row_scales, run_table, levels, run, outputs, block, padded, height, m,
                    KINDS[number], CODES, M, TOKENS, STAGES,
                )  # fmt: skip
            tl.store(into, outputs.to(into.dtype.element_ty), mask=wanted)
    if kind == len(KINDS):
        outputs = _singles_of_many(
            x, singles, order + single_start, factors + single_start, first, last, tokens, columns, height, m, t,
            CODES, M, TOKENS,
        )  # fmt: skip
        tl.store(into, outputs.to(into.dtype.element_ty), mask=wanted)
    if SPLIT:
        zero = tl.zeros((M, TOKENS), tl.float32)
        add_up(partial, counters, y, offsets, wanted, tl.num_programs(1), tokens * rows, zero)


@triton.jit
def _write_words(
    words, factors, row_scales, exact_levels, dense, start, count, column, segment, local, kept, columns, height, m,
    TERMS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    scale = scale_values(tl.load(row_scales + segment * height + m, mask=kept, other=0), CODES)
    size = TERMS * height + BEFORE
    place = words + start.to(tl.int64) * UNIT + BEFORE + m[:, None]
    bit, begin = tl.arange(0, COLUMNS)[None, :], whole_words(column)
    shift = 16 * (bit // 4 % 2) + 4 * (bit % 4) + bit // 8
    into = dense + local.to(tl.int64)[:, None] * columns + begin + bit
    source = factors + begin + bit
    for _ in range(count):
        signs = loaded(place, height, kept[:, None], TERMS, 1)
        number = (((signs[0] ^ signs[1] ^ signs[3]) >> shift) & 1) * 2 + ((signs[2] >> shift) & 1)
        for sign in tl.static_range(TERMS - 1):
            number += ((signs[4 + sign] >> shift) & 1) << (TERMS - sign)
        level = tl.load(exact_levels + 32 * (TERMS - 1) + number)
        value = level * (scale[:, None] * tl.load(source))
        tl.store(into, value.to(dense.dtype.element_ty), mask=kept[:, None])
        place += size
        into += COLUMNS
        source += COLUMNS


@triton.jit(do_not_specialize=["start"])  # as in `triton_trellis_matvec.few_tokens`
def dequantize(
    words, factors, row_scales, units, exact_levels, singles, dense,
    start, stop, columns, height,
    KINDS: tl.constexpr, CODES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Dense weights (rows, columns) of rows [start, stop), columns in the order of `PreparedTrellis.order`.

    Program (rows, unit). What fills single columns up is not written.
    """
    local = tl.program_id(0) * M + tl.arange(0, M)
    m, kept = start + local, start + local < stop
    kind, first, count, column, segment = unit_fields(units, tl.program_id(1))
    for number in tl.static_range(len(KINDS)):
        if kind == number:
            _write_words(
                words, factors, row_scales, exact_levels, dense, first, count, column, segment, local, kept, columns,
                height, m, KINDS[number], CODES,
            )  # fmt: skip
    if kind == len(KINDS):
        single = tl.arange(0, SINGLES)[None, :]
        there = kept[:, None] & (single < count)
        weight = single_weight(singles + (first + single).to(tl.int64) * height + m[:, None], there, CODES)
        weight *= tl.load(factors + column + single, mask=single < count, other=0)
        into = dense + local.to(tl.int64)[:, None] * columns + column + single
        tl.store(into, weight.to(dense.dtype.element_ty), mask=there)


@triton.jit
def gather(x, order, into, columns, width, WIDTH: tl.constexpr):
    """Inputs in another order, a token a program, whose inputs stay in the cache next to it."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < width
        natural = tl.load(order + column, mask=inside, other=0)
        tl.store(into + token * width + column, tl.load(x + token * columns + natural, mask=inside), mask=inside)
