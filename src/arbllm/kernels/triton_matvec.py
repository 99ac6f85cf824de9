"""Triton kernel for a few tokens, levels or signs times inputs four at a time.

Both are bytes (see `triton_levels`). Inputs times column scales are whole numbers of 16 bits, as two bytes each, scaled
to the largest of those that a program multiplies. Their sums are exact; row scales come in at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.triton_levels import group_quads, level_unit, quads
from arbllm.kernels.triton_parts import (
    BEFORE,
    COLUMNS,
    INTERPRETED,
    SINGLES,
    U_COLUMN,
    U_FACTOR,
    U_KIND,
    U_LENGTH,
    U_START,
    UNIT,
    add_up,
    begin,
    groups_of,
    has_trellis,
    kind_at,
    loaded,
    planes_of,
    single_weight,
    slot_scales,
    slots_of,
    terms_of,
    unit_fields,
    whole_numbers,
    whole_words,
)


@triton.jit
def _dot(quad, inputs, total):
    """Add the product of four bytes with four bytes to whole numbers (words, rows)."""
    if INTERPRETED:
        shift = 24 - 8 * tl.arange(0, 4)[None, None, :]
        return total + tl.sum(((quad[:, :, None] << shift) >> 24) * ((inputs[:, :, None] << shift) >> 24), 2)
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [quad, inputs, total], tl.int32, True, 1
        )


@triton.jit
def _keep_inputs(
    x, order, factors, scratch, scales, column, factor, stride, low, high, first_token, tokens, columns,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write inputs times factors as whole numbers, and for each slot and token what one stands for, and their sum.

    Of four columns the upper bytes of all are one word, the lower bytes the next; 0 outside of [low, high).
    """
    k, t = tl.arange(0, SPAN * COLUMNS), tl.arange(0, TOKENS)
    inside, asked = ((k >= low) & (k < high))[None, :], (first_token + t < tokens)[:, None]
    natural = tl.load(order + whole_words(column) + k[None, :], mask=inside, other=0)
    token = (first_token + t).to(tl.int64)[:, None]
    value = tl.load(x + token * columns + natural, mask=inside & asked, other=0).to(tl.float32)
    quad = tl.arange(0, SPAN * 8)[None, :]
    into = scratch + (quad // 8 * (SLOTS * TOKENS) + t[:, None]) * 8 + quad % 8
    source = factors + whole_words(factor) + k[None, :]
    for slot in tl.static_range(SLOTS):
        share = tl.load(source + slot * whole_words(stride), mask=inside, other=0)
        whole, norm, total = whole_numbers(value * share)
        upper = (whole + 128) >> 8
        first, second = _packed_bytes(upper, TOKENS, SPAN * 8), _packed_bytes(whole - (upper << 8), TOKENS, SPAN * 8)
        tl.store(into + slot * (TOKENS * 8), (second.to(tl.int64) << 32) | (first.to(tl.int64) & 0xFFFFFFFF))
        tl.store(scales + 2 * slot * TOKENS + t, norm)
        tl.store(scales + (2 * slot + 1) * TOKENS + t, total.to(tl.float32))


@triton.jit
def _packed_bytes(values, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """The lowest bytes of four whole numbers that follow each other in one: (ROWS, 4 COUNT) to (ROWS, COUNT)."""
    return tl.sum(tl.reshape(values & 255, (ROWS, COUNT, 4)) << (8 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def _dots(found, inputs, sums, FIRST: tl.constexpr, TOKENS: tl.constexpr):
    """Two sums for each token, from FIRST on in a tuple, with the products of words' quads and their inputs added.

    `inputs` (words, 1) is where those of each word are.
    """
    result = ()
    for t in tl.static_range(TOKENS):
        high, low = sums[FIRST + 2 * t], sums[FIRST + 2 * t + 1]
        for q in tl.static_range(8):
            both = tl.load(inputs + t * 8 + q)
            high = _dot(found[q], tl.broadcast_to(both.to(tl.int32), high.shape), high)
            low = _dot(found[q], tl.broadcast_to((both >> 32).to(tl.int32), low.shape), low)
        result = result + (high, low)
    return result


@triton.jit
def _products(bits, levels, inputs, sums, KIND: tl.constexpr, MEANS: tl.constexpr, TOKENS: tl.constexpr):
    """The sums of all slots with the products of some words added."""
    result = ()
    if has_trellis(KIND):
        result = _dots(quads(bits, levels, terms_of(KIND), False), inputs, sums, 0, TOKENS)
    else:
        for slot in tl.static_range(slots_of(KIND, MEANS)):
            if slot < groups_of(KIND) * terms_of(KIND):
                found = group_quads(bits, KIND, slot // terms_of(KIND), slot % terms_of(KIND), False)
            else:
                found = group_quads(bits, KIND, slot - groups_of(KIND) * terms_of(KIND), 0, True)
            result = result + _dots(found, inputs + slot * (TOKENS * 8), sums, 2 * slot * TOKENS, TOKENS)
    return result


@triton.jit
def _scaled(sums, shares, scales, T: tl.constexpr, KIND: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr):
    """The outputs of a token: sums of all slots times what rows and a whole number stand for."""
    total = shares[0] * 0.0
    for slot in tl.static_range(SLOTS):
        high, low = tl.sum(sums[2 * (slot * TOKENS + T)], 0), tl.sum(sums[2 * (slot * TOKENS + T) + 1], 0)
        value = high.to(tl.float32) * 256 + low.to(tl.float32)
        norm = scales + 2 * slot * TOKENS + T
        if has_trellis(KIND):  # byte v of a level stands for v + 1/2
            value = (value + 0.5 * tl.load(norm + TOKENS)) * level_unit(terms_of(KIND))
        total += value * (shares[slot] * tl.load(norm))
    return total


@triton.jit
def _unit_of_few(
    x, words, order, factors, row_scales, row_means, levels, scratch, scales, into, fields, block, tokens, columns,
    rows, height, m,
    KIND: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr,
    M: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The products of a few words of columns, WORDS side by side."""
    SLOTS: tl.constexpr = slots_of(KIND, MEANS)
    _, start, count, begins, ends, column, factor, stride, scale, mean = fields
    side, own = tl.arange(0, WORDS)[:, None], (m < height)[None, :]
    size = planes_of(KIND) * height + BEFORE
    place = words + start.to(tl.int64) * UNIT + BEFORE + side * size + m[None, :]
    bits = loaded(place, height, own & (side < count), KIND, 1)  # on their way while inputs are made ready
    shares = slot_scales(row_scales, row_means, scale, mean, height, m, KIND, CODES, MEANS)
    begin(EARLY)
    _keep_inputs(
        x, order, factors, scratch, scales, column, factor, stride, begins, ends, block * TOKENS, tokens, columns,
        SLOTS, TOKENS, SPAN,
    )  # fmt: skip
    tl.debug_barrier()
    sums = ()
    for _ in tl.static_range(2 * SLOTS * TOKENS):
        sums = sums + (tl.zeros((WORDS, M), tl.int32),)
    inputs = scratch + side * (SLOTS * TOKENS * 8)
    for word in range(0, count, WORDS):
        place += WORDS * size
        following = loaded(place, height, own & (word + WORDS + side < count), KIND, 1)
        sums = _products(bits, levels, inputs, sums, KIND, MEANS, TOKENS)
        inputs += WORDS * SLOTS * TOKENS * 8
        bits = following
    for t in tl.static_range(TOKENS):
        token = block * TOKENS + t
        total = _scaled(sums, shares, scales, t, KIND, SLOTS, TOKENS)
        tl.store(into + token.to(tl.int64) * rows + m, total, mask=(m < rows) & (token < tokens))


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


# Compiling takes seconds, so that there are no kernels for numbers of tokens that are 1 or multiples of 16.
@triton.jit(do_not_specialize=["tokens"])
def few_tokens(
    x, words, order, factors, row_scales, row_means, units, levels, singles, scratch, scales, counters, partial, y,
    tokens, columns, rows, height,
    KINDS: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr, SLOTS: tl.constexpr, SPLIT: tl.constexpr,
    TOKENS: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y = x W^T for a block of tokens, M rows and one unit of columns, of SPAN words and SLOTS slots at most."""
    place, unit, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = place * M + tl.arange(0, M)
    fields = unit_fields(units, unit)
    program = (block * tl.num_programs(1) + unit) * tl.num_programs(0) + place
    own = scratch + program.to(tl.int64) * (SPAN * 8 * SLOTS * TOKENS)
    scales += program * (2 * SLOTS * TOKENS)
    into = partial + unit.to(tl.int64) * tokens * rows if SPLIT else y
    for number in tl.static_range(len(KINDS)):
        if fields[U_KIND] == number:
            _unit_of_few(
                x, words, order, factors, row_scales, row_means, levels, own, scales, into, fields, block, tokens,
                columns, rows, height, m, kind_at(KINDS, number), CODES, MEANS, TOKENS, SPAN, M, WORDS, EARLY,
            )  # fmt: skip
    if fields[U_KIND] == len(KINDS):
        order += fields[U_COLUMN]
        factors += fields[U_FACTOR]
        _singles_of_few(
            x, singles, order, factors, into, fields[U_START], fields[U_LENGTH], block, tokens, columns, rows, height,
            m, CODES, TOKENS, EARLY,
        )  # fmt: skip
    if SPLIT:
        t = block * TOKENS + tl.arange(0, TOKENS)
        offsets, wanted = t.to(tl.int64)[:, None] * rows + m[None, :], (t < tokens)[:, None] & (m < rows)[None, :]
        zero = tl.zeros((TOKENS, M), tl.float32)
        add_up(partial, counters, y, offsets, wanted, tl.num_programs(1), tokens * rows, zero, 16)
