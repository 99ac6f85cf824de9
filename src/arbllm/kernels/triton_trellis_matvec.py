"""Triton kernel for a few tokens times a matrix with a trellis, levels times inputs four at a time.

Levels are bytes (see `triton_trellis_levels`). Inputs times column scales are whole numbers of 16 bits, as two bytes
each, scaled to the largest of those that a program multiplies. Their sums are exact; row scales come in at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.triton_parts import INTERPRETED, scale_values
from arbllm.kernels.triton_trellis_levels import level_unit, quads
from arbllm.kernels.triton_trellis_parts import (
    BEFORE,
    COLUMNS,
    SINGLES,
    UNIT,
    add_up,
    begin,
    loaded,
    single_weight,
    unit_fields,
    whole_numbers,
    whole_words,
)


@triton.jit
def _dot(quad, inputs, total):
    """Add the product of four bytes with four bytes to whole numbers."""
    if INTERPRETED:
        for place in tl.static_range(4):
            shift = 24 - 8 * place
            total += ((quad << shift) >> 24) * ((inputs << shift) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [quad, inputs, total], tl.int32, True, 1
        )


@triton.jit
def _keep_inputs(
    x, order, factors, scratch, scales, start, count, first_token, tokens, columns,
    TOKENS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write inputs times column factors as whole numbers, and for each token what one stands for, and their sum.

    Of four columns the upper bytes of all are one word, the lower bytes the next; what is beyond `count` columns is 0.
    """
    column, t = tl.arange(0, SPAN * COLUMNS), tl.arange(0, TOKENS)
    inside, asked = (column < count)[None, :], (first_token + t < tokens)[:, None]
    natural = tl.load(order + start + column[None, :], mask=inside, other=0)
    token = (first_token + t).to(tl.int64)[:, None]
    value = tl.load(x + token * columns + natural, mask=inside & asked, other=0).to(tl.float32)
    value *= tl.load(factors + start + column[None, :], mask=inside, other=0)
    whole, norm, total = whole_numbers(value)
    upper = (whole + 128) >> 8
    high, low = _packed_bytes(upper, TOKENS, SPAN * 8), _packed_bytes(whole - (upper << 8), TOKENS, SPAN * 8)
    quad = tl.arange(0, SPAN * 8)[None, :]
    into = scratch + (quad // 8 * TOKENS + t[:, None]) * 8 + quad % 8
    tl.store(into, (low.to(tl.int64) << 32) | (high.to(tl.int64) & 0xFFFFFFFF))
    tl.store(scales + t, norm)
    tl.store(scales + TOKENS + t, total.to(tl.float32))


@triton.jit
def _packed_bytes(values, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """The lowest bytes of four whole numbers that follow each other in one: (ROWS, 4 COUNT) to (ROWS, COUNT)."""
    return tl.sum(tl.reshape(values & 255, (ROWS, COUNT, 4)) << (8 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def _dots(found, inputs, sums, TOKENS: tl.constexpr):
    """Add the products of words' quads with the inputs of their columns to a tuple of sums, two for each token.

    `inputs` (words, 1) is where those of each word are.
    """
    result = ()
    for t in tl.static_range(TOKENS):
        high, low = sums[2 * t], sums[2 * t + 1]
        for q in tl.static_range(8):
            both = tl.load(inputs + t * 8 + q)
            high = _dot(found[q], tl.broadcast_to(both.to(tl.int32), high.shape), high)
            low = _dot(found[q], tl.broadcast_to((both >> 32).to(tl.int32), low.shape), low)
        result = result + (high, low)
    return result


@triton.jit
def _unit_of_few(
    x, words, order, factors, row_scales, levels, scratch, scales, into, start, count, column, segment, block,
    tokens, columns, rows, height, m,
    TERMS: tl.constexpr, CODES: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr,
    WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The products of a few words of columns, WORDS side by side."""
    side, own = tl.arange(0, WORDS)[:, None], (m < height)[None, :]
    size = TERMS * height + BEFORE
    place = words + start.to(tl.int64) * UNIT + BEFORE + side * size + m[None, :]
    signs = loaded(place, height, own & (side < count), TERMS, 1)  # on their way while inputs are made ready
    scale = tl.load(row_scales + segment * height + m, mask=m < height, other=0)
    begin(EARLY)
    _keep_inputs(
        x, order, factors, scratch, scales, whole_words(column), count * COLUMNS, block * TOKENS, tokens,
        columns, TOKENS, SPAN,
    )  # fmt: skip
    tl.debug_barrier()
    sums = ()
    for _ in tl.static_range(2 * TOKENS):
        sums = sums + (tl.zeros((WORDS, M), tl.int32),)
    inputs = scratch + side * (TOKENS * 8)
    for word in range(0, count, WORDS):
        place += WORDS * size
        following = loaded(place, height, own & (word + WORDS + side < count), TERMS, 1)
        sums = _dots(quads(signs, levels, TERMS, False), inputs, sums, TOKENS)
        inputs += WORDS * TOKENS * 8
        signs = following
    factor = scale_values(scale, CODES) * level_unit(TERMS)
    for t in tl.static_range(TOKENS):
        token = block * TOKENS + t
        high, low = tl.sum(sums[2 * t], 0), tl.sum(sums[2 * t + 1], 0)
        value = high.to(tl.float32) * 256 + low.to(tl.float32) + 0.5 * tl.load(scales + TOKENS + t)
        value *= factor * tl.load(scales + t)
        tl.store(into + token.to(tl.int64) * rows + m, value, mask=(m < rows) & (token < tokens))


@triton.jit
def _singles_of_few(
    x, singles, order, factors, into, first, count, block, tokens, columns, rows, height, m,
    CODES: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The products of columns with a scale for each weight, of which `order` and `factors` are."""
    column = tl.arange(0, SINGLES)
    there = column < count
    place = singles + (first + column).to(tl.int64)[:, None] * height + m[None, :]
    weight = single_weight(place, there[:, None] & (m < height)[None, :], CODES)
    natural, factor = tl.load(order + column, mask=there, other=0), tl.load(factors + column, mask=there, other=0)
    begin(EARLY)
    for t in tl.static_range(TOKENS):
        token = block * TOKENS + t
        value = tl.load(x + token.to(tl.int64) * columns + natural, mask=there & (token < tokens), other=0)
        total = tl.sum(weight * (value.to(tl.float32) * factor)[:, None], 0)
        tl.store(into + token.to(tl.int64) * rows + m, total, mask=(m < rows) & (token < tokens))


# Compiling takes seconds, so that there are no kernels for numbers that are 1 or multiples of 16 in some layers alone.
@triton.jit(do_not_specialize=["tokens"])
def few_tokens(
    x, words, order, factors, row_scales, units, levels, singles, scratch, scales, counters, partial, y,
    tokens, columns, rows, height,
    KINDS: tl.constexpr, CODES: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr,
    M: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y = x W^T for a block of tokens, M rows and one unit of columns, of SPAN words at most."""
    place, unit, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = place * M + tl.arange(0, M)
    kind, start, count, column, segment = unit_fields(units, unit)
    program = (block * tl.num_programs(1) + unit) * tl.num_programs(0) + place
    own = scratch + program.to(tl.int64) * (SPAN * 8 * TOKENS)
    scales += program * (2 * TOKENS)
    into = partial + unit.to(tl.int64) * tokens * rows if SPLIT else y
    for number in tl.static_range(len(KINDS)):
        if kind == number:
            _unit_of_few(
                x, words, order, factors, row_scales, levels, own, scales, into, start, count, column, segment, block,
                tokens, columns, rows, height, m, KINDS[number], CODES, TOKENS, SPAN, M, WORDS, EARLY,
            )  # fmt: skip
    if kind == len(KINDS):
        _singles_of_few(
            x, singles, order + column, factors + column, into, start, count, block, tokens, columns, rows, height, m,
            CODES, TOKENS, EARLY,
        )  # fmt: skip
    if SPLIT:
        t = block * TOKENS + tl.arange(0, TOKENS)
        offsets, wanted = t.to(tl.int64)[:, None] * rows + m[None, :], (t < tokens)[:, None] & (m < rows)[None, :]
        zero = tl.zeros((TOKENS, M), tl.float32)
        add_up(partial, counters, y, offsets, wanted, tl.num_programs(1), tokens * rows, zero, 16)
