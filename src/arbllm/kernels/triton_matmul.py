"""Triton kernels for many tokens: tiles of the weight in registers, or written out, for ordinary matrix products.

Columns are in the order of `Prepared.order` throughout: those in words, then single columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.triton_parts import (
    FIELDS,
    INTERPRETED,
    RUN_CHUNKS,
    RUN_COLUMN,
    RUN_FACTOR,
    RUN_GROUPS,
    RUN_HIGH,
    RUN_LOW,
    RUN_ROW_MEAN,
    RUN_SLOT,
    RUN_STOP,
    RUN_TERMS,
    RUN_WIDTH,
    add_up,
    plain_planes,
    planes_of,
    scale_values,
    store_tokens,
    words_of_chunk,
    words_of_run,
    zeros,
)


@triton.jit
def _row_parameters(
    fields, row_scales, row_means, rows, quarter, m,
    GROUPS: tl.constexpr, TERMS: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """A tuple of (M): for each of a word's four rows the scale of each group and term, then the mean of each group."""
    found = ()
    for q in tl.static_range(4):
        row = q * quarter + m
        inside = (m < quarter) & (row < rows)
        slot = row_scales + tl.load(fields + RUN_SLOT).to(tl.int64) * rows + row
        for place in tl.static_range(GROUPS * TERMS):
            found = found + (scale_values(tl.load(slot + place * rows, mask=inside, other=0), CODES),)
        if MEANS:
            slot = row_means + tl.load(fields + RUN_ROW_MEAN).to(tl.int64) * rows + row
            for group in tl.static_range(GROUPS):
                found = found + (tl.load(slot + group * rows, mask=inside, other=0).to(tl.float32),)
    return found


@triton.jit
def _column_factors(
    fields, column_scales, steps, k, inside,
    GROUPS: tl.constexpr, TERMS: tl.constexpr, SCALED: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """A tuple of (K): what the scale of each group and term is multiplied by in each column."""
    found = ()
    for slot in tl.static_range(GROUPS * TERMS):
        factor = tl.where(inside, 1.0, 0.0)
        if SCALED:
            place = tl.load(fields + RUN_FACTOR) + slot * tl.load(fields + RUN_WIDTH) + k
            factor = scale_values(tl.load(column_scales + place, mask=inside, other=0), CODES)
        if CODES:
            factor *= tl.load(steps + tl.load(fields + RUN_SLOT) + slot).to(tl.float32)
        found = found + (factor,)
    return found


@triton.jit
def _of_group(low, high, values, GROUPS: tl.constexpr):
    """Of each weight the value of its group; `values` is a tuple."""
    chosen = values[0]
    if GROUPS > 1:
        chosen = tl.where(low, values[1], chosen)
    if GROUPS > 2:
        chosen = tl.where(high, tl.where(low, values[3], values[2]), chosen)
    return chosen


@triton.jit
def _weights(
    planes, parameters, factors, inside, QUARTER: tl.constexpr, BIT: tl.constexpr,
    GROUPS: tl.constexpr, TERMS: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """The weights (M, K) that one bit of the words stands for, float32; 0 outside the run."""
    SHIFT: tl.constexpr = 4 * QUARTER + BIT
    FIRST: tl.constexpr = QUARTER * GROUPS * (TERMS + MEANS)
    low = ((planes[TERMS if GROUPS > 1 else 0] >> SHIFT) & 1) != 0
    high = ((planes[TERMS + 1 if GROUPS > 2 else 0] >> SHIFT) & 1) != 0
    value = tl.zeros(planes[0].shape, tl.float32)
    for term in tl.static_range(TERMS):
        products = ()
        for group in tl.static_range(GROUPS):
            scale = parameters[FIRST + group * TERMS + term]
            products = products + (scale[:, None] * factors[group * TERMS + term][None, :],)
        size = _of_group(low, high, products, GROUPS)
        value += tl.where(((planes[term] >> SHIFT) & 1) != 0, size, -size)
    if MEANS:
        means = ()
        for group in tl.static_range(GROUPS):
            means = means + (parameters[FIRST + GROUPS * TERMS + group][:, None],)
        value += tl.where(inside[None, :], _of_group(low, high, means, GROUPS), 0.0)
    return value


@triton.jit
def _single_weights(
    singles, single_columns, column_scales, steps, column, row, own, count, rows,
    SCALED: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Weights (M, K) of some single columns, float32."""
    valid = column < count
    inside = (own & (row < rows))[:, None] & valid[None, :]
    stored = tl.load(singles + column[None, :].to(tl.int64) * rows + row[:, None], mask=inside, other=0)
    value = scale_values(tl.abs(stored), CODES)
    value = tl.where(stored < 0, -value, value)
    if SCALED:
        factor = tl.load(single_columns + 2 * count + column, mask=valid, other=0)
        value *= scale_values(tl.load(column_scales + factor, mask=valid, other=0), CODES)[None, :]
    if CODES:
        slot = tl.load(single_columns + count + column, mask=valid, other=0)
        value *= tl.load(steps + slot, mask=valid, other=0).to(tl.float32)[None, :]
    return value


@triton.jit
def _product(weights, inputs, total, PRECISION: tl.constexpr):
    """Add the product of weights (M, K) with inputs (TOKENS, K), in the dtype of these."""
    rounded = weights.to(inputs.dtype)
    if INTERPRETED:  # whose products know no bfloat16
        return tl.dot(rounded.to(tl.float32), tl.trans(inputs).to(tl.float32), total)
    else:
        return tl.dot(rounded, tl.trans(inputs), total, input_precision=PRECISION)


@triton.jit
def _products_of_kind(
    sums, source, words, row_scales, row_means, run_table, column_scales, steps, first, last, wanted, rows, quarter, m,
    GROUPS: tl.constexpr, TERMS: tl.constexpr,
    SCALED: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr,
    PRECISION: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`sums`, a tuple of four (M, TOKENS) for the rows of a word, with the runs [first, last) of one kind added."""
    BITS: tl.constexpr = planes_of(GROUPS, TERMS)
    w = tl.arange(0, WORDS)
    stride = quarter * 16
    for run in range(first, last):
        fields = run_table + run * FIELDS
        chunks, low, high = tl.load(fields + RUN_CHUNKS), tl.load(fields + RUN_LOW), tl.load(fields + RUN_HIGH)
        parameters = _row_parameters(fields, row_scales, row_means, rows, quarter, m, GROUPS, TERMS, CODES, MEANS)
        own = words_of_run(fields, words, m, w, quarter, BITS)
        inputs = source + (tl.load(fields + RUN_COLUMN) + w // 16 * 64 + w % 16)[None, :]
        for chunk in range(0, chunks, WORDS // 16):
            valid = ((chunk + w // 16) < chunks)[None, :]
            there = valid & (m < quarter)[:, None]
            start = own + chunk * words_of_chunk(quarter, BITS)
            planes = plain_planes(start, there, stride, GROUPS, TERMS)
            for bit in tl.static_range(4):
                k = (chunk + w // 16) * 64 + bit * 16 + w % 16
                inside = (k >= low) & (k < high)
                factors = _column_factors(fields, column_scales, steps, k, inside, GROUPS, TERMS, SCALED, CODES)
                tokens = tl.load(inputs + chunk * 64 + bit * 16, mask=wanted & valid, other=0)
                result = ()
                for q in tl.static_range(4):
                    weights = _weights(planes, parameters, factors, inside, q, bit, GROUPS, TERMS, MEANS)
                    result = result + (_product(weights, tokens, sums[q], PRECISION),)
                sums = result
    return sums


@triton.jit
def _products_of_singles(
    sums, source, singles, single_columns, column_scales, steps, first, last, wanted, rows, quarter, count, m,
    SCALED: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`sums` with single columns [first, last) added."""
    for start in range(first, last, 16):
        column = start + tl.arange(0, 16)
        tokens = tl.load(source + column[None, :], mask=wanted & (column < last)[None, :], other=0)
        result = ()
        for q in tl.static_range(4):
            weights = _single_weights(
                singles, single_columns, column_scales, steps, column, q * quarter + m, m < quarter, count, rows,
                SCALED, CODES,
            )  # fmt: skip
            result = result + (_product(weights, tokens, sums[q], PRECISION),)
        sums = result
    return sums


@triton.jit(do_not_specialize=["tokens", "count"])  # as in `triton_matvec.few_tokens`
def many_tokens(
    xs, words, row_scales, row_means, run_table, units, singles, single_columns, column_scales, steps,
    partial, counters, y,
    tokens, columns, single_start, rows, quarter, count,
    KINDS: tl.constexpr, SCALED: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """y = x W^T for a block of tokens, 4 M rows and one unit of columns; `xs` (tokens, columns) in the words' order."""
    place, unit, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = place * M + tl.arange(0, M)
    token = block * TOKENS + tl.arange(0, TOKENS)
    kind, first, last = tl.load(units + 3 * unit), tl.load(units + 3 * unit + 1), tl.load(units + 3 * unit + 2)
    source = xs + token[:, None].to(tl.int64) * columns
    wanted = (token < tokens)[:, None]
    into = partial + unit * tokens * rows if SPLIT else y
    for number in tl.static_range(len(KINDS)):
        if kind == number:
            sums = _products_of_kind(
                zeros(4, M, TOKENS), source, words, row_scales, row_means, run_table, column_scales, steps, first, last,
                wanted, rows, quarter, m, KINDS[number][0], KINDS[number][1], SCALED, CODES, MEANS,
                PRECISION, WORDS,
            )  # fmt: skip
            for q in tl.static_range(4):
                store_tokens(sums[q], into, q, token, tokens, rows, quarter, m)
    if kind == len(KINDS):
        sums = _products_of_singles(
            zeros(4, M, TOKENS), source + single_start, singles, single_columns, column_scales, steps, first, last,
            wanted, rows, quarter, count, m, SCALED, CODES, PRECISION,
        )  # fmt: skip
        for q in tl.static_range(4):
            store_tokens(sums[q], into, q, token, tokens, rows, quarter, m)
    if SPLIT:
        add_up(partial, counters, y, place, block, tl.num_programs(1), tokens, rows, quarter, m, token, M, TOKENS)


@triton.jit
def _write_run(
    fields, words, row_scales, row_means, column_scales, steps, dense, local, kept, piece, columns, rows, quarter, m,
    GROUPS: tl.constexpr, TERMS: tl.constexpr,
    SCALED: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = planes_of(GROUPS, TERMS)
    w = tl.arange(0, 16)
    stride = quarter * 16
    low, high, stop = tl.load(fields + RUN_LOW), tl.load(fields + RUN_HIGH), tl.load(fields + RUN_STOP)
    parameters = _row_parameters(fields, row_scales, row_means, rows, quarter, m, GROUPS, TERMS, CODES, MEANS)
    own = words_of_run(fields, words, m, w, quarter, BITS)
    into = dense + tl.load(fields + RUN_COLUMN) + w[None, :]
    for chunk in range(tl.load(fields + RUN_CHUNKS)):
        valid = (m < quarter)[:, None] & (w < 16)[None, :]
        start = own + chunk * words_of_chunk(quarter, BITS)
        planes = plain_planes(start, valid, stride, GROUPS, TERMS)
        for bit in tl.static_range(4):
            k = chunk * 64 + bit * 16 + w
            inside = (k >= low) & (k < high)
            factors = _column_factors(fields, column_scales, steps, k, inside, GROUPS, TERMS, SCALED, CODES)
            for q in tl.static_range(4):
                weights = _weights(planes, parameters, factors, inside, q, bit, GROUPS, TERMS, MEANS)
                place = into + (q * piece + local).to(tl.int64)[:, None] * columns + chunk * 64 + bit * 16
                stored = kept[:, None] & ((k >= low) & (k < stop))[None, :]
                tl.store(place, weights.to(dense.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["start", "piece", "runs", "count"])  # likewise
def dequantize(
    words, row_scales, row_means, run_table, singles, single_columns, column_scales, steps, dense,
    start, piece, runs, columns, single_start, rows, quarter, count,
    KINDS: tl.constexpr, SCALED: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Dense weights (4, piece, columns) of `piece` rows of words from `start` on, a word's four rows apart.

    Program (rows of words, run); of runs beyond the last, 16 single columns each.
    """
    local = tl.program_id(0) * M + tl.arange(0, M)
    run = tl.program_id(1)
    m, kept = start + local, local < piece
    if run < runs:
        fields = run_table + run * FIELDS
        groups, terms = tl.load(fields + RUN_GROUPS), tl.load(fields + RUN_TERMS)
        for number in tl.static_range(len(KINDS)):
            if (groups == KINDS[number][0]) & (terms == KINDS[number][1]):
                _write_run(
                    fields, words, row_scales, row_means, column_scales, steps, dense, local, kept, piece, columns,
                    rows, quarter, m, KINDS[number][0], KINDS[number][1], SCALED, CODES, MEANS,
                )  # fmt: skip
    else:
        column = (run - runs) * 16 + tl.arange(0, 16)
        for q in tl.static_range(4):
            weights = _single_weights(
                singles, single_columns, column_scales, steps, column, q * quarter + m, m < quarter, count, rows,
                SCALED, CODES,
            )  # fmt: skip
            place = dense + (q * piece + local).to(tl.int64)[:, None] * columns + (single_start + column)[None, :]
            tl.store(place, weights.to(dense.dtype.element_ty), mask=kept[:, None])
