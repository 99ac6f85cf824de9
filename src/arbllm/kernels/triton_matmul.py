"""Triton kernels for many tokens: bytes of levels on tensor cores, or weights written out.

Levels and inputs are bytes as in `triton_matvec`; weights that are written out have levels as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.triton_levels import level_unit, quads
from arbllm.kernels.triton_parts import (
    BEFORE,
    CHUNK,
    COLUMNS,
    INTERPRETED,
    SINGLES,
    U_COLUMN,
    U_FACTOR,
    U_KIND,
    U_LENGTH,
    U_SCALE,
    U_START,
    UNIT,
    add_up,
    begin,
    groups_of,
    has_trellis,
    kind_at,
    loaded,
    planes_of,
    scale_values,
    single_weight,
    slot_scales,
    terms_of,
    unit_field,
    unit_fields,
    whole_numbers,
    whole_words,
)


@triton.jit(do_not_specialize=["tokens"])
def scale_inputs(
    x, order, factors, chunk_table, bytes_of_inputs, norms, totals, counters,
    tokens, padded, columns, places,
    TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Inputs of one token and chunk as whole numbers, for `many_tokens`: program (chunk, token); and zero counters.

    Bytes: (chunks, blocks of tokens, upper and lower bytes, tokens, quads of a word, words, columns of a quad). What
    one stands for, and half of the sum of all, which levels v + 1/2 add: (chunks, padded tokens).
    """
    chunk, token, k = tl.program_id(0), tl.program_id(1), tl.arange(0, CHUNK * COLUMNS)
    column = k % 32 // 4 * COLUMNS + k // 32 * 4 + k % 4
    inside = (column < unit_field(chunk_table, chunk, U_LENGTH) * COLUMNS) & (token < tokens)
    order += whole_words(unit_field(chunk_table, chunk, U_COLUMN))
    factors += whole_words(unit_field(chunk_table, chunk, U_FACTOR))
    natural, factor = tl.load(order + column, mask=inside, other=0), tl.load(factors + column, mask=inside, other=0)
    begin(EARLY)
    value = tl.load(x + token.to(tl.int64) * columns + natural, mask=inside, other=0).to(tl.float32)
    whole, norm, total = whole_numbers((value * factor)[None, :])
    upper = (whole + 128) >> 8
    line = chunk * (2 * padded) + token // TOKENS * (2 * TOKENS) + token % TOKENS
    into = bytes_of_inputs + line.to(tl.int64) * (CHUNK * COLUMNS) + k[None, :]
    tl.store(into, upper.to(tl.int8))
    tl.store(into + TOKENS * (CHUNK * COLUMNS), (whole - (upper << 8)).to(tl.int8))
    place = chunk * padded + token + tl.arange(0, 1)
    tl.store(norms + place, norm)
    tl.store(totals + place, (total + 1) >> 1)
    for number in range(chunk * padded + token, places, tl.num_programs(0) * padded):
        tl.store(counters + number, 0)


@triton.jit
def _in_bytes(words, M: tl.constexpr):
    """Bytes (M, 32) of words (M, 8), the lowest first."""
    result = ()
    for word in words:
        parts = (word[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
        result = result + (tl.reshape(parts, (M, 32)).to(tl.int8),)
    return result


@triton.jit
def _chunk(place, height, count, m, levels, KIND: tl.constexpr, M: tl.constexpr):
    """The levels of a chunk of `count` words as an operand of tensor cores: int8 (M, quads, words, columns of a quad).

    Compilers keep each in the register that it was made in: a word is loaded as four bytes, where the tensor cores'
    layout has them in one, and quads only come to stand behind each other.
    """
    size = planes_of(KIND) * height + BEFORE
    there = (m < height)[:, None]
    if INTERPRETED:
        w = tl.arange(0, 8)[None, :]
        signs = place.to(tl.pointer_type(tl.int32)) + m[:, None] + w * size
        found = _in_bytes(quads(loaded(signs, height, there & (w < count), KIND, 1), levels, terms_of(KIND), False), M)
    else:
        k = tl.arange(0, 32)[None, :]
        signs = place + (4 * m)[:, None] + (k // 4 * (4 * size) + k % 4)
        found = quads(loaded(signs, height, there & (k // 4 < count), KIND, 4), levels, terms_of(KIND), True)
    even = tl.join(tl.join(found[0], found[4]), tl.join(found[2], found[6]))
    odd = tl.join(tl.join(found[1], found[5]), tl.join(found[3], found[7]))
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1)), (M, CHUNK * COLUMNS))


@triton.jit
def _of_both_bytes(sums, M: tl.constexpr, TOKENS: tl.constexpr):
    """Sums of upper bytes' products (M, TOKENS), and of lower ones', as one: a chunk's is less than 2**31."""
    upper, lower = tl.split(tl.permute(tl.reshape(sums, (M, 2, TOKENS)), (0, 2, 1)))
    return (upper << 8) + lower


@triton.jit
def _chunks_of_many(
    words, inputs, norms, totals, row_scales, chunk_table, levels, first, count, block, padded, height, m,
    KIND: tl.constexpr, CODES: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(M, TOKENS): the products of some chunks of columns with a trellis."""
    k, n, t = tl.arange(0, CHUNK * COLUMNS), tl.arange(0, 2 * TOKENS), block * TOKENS + tl.arange(0, TOKENS)
    source = inputs + ((first * 2 * padded + block * (2 * TOKENS)).to(tl.int64) + n[:, None]) * (CHUNK * COLUMNS)
    source += k[None, :]
    norms, totals = norms + first * padded + t, totals + first * padded + t
    outputs = tl.zeros((M, TOKENS), tl.float32)
    start, length = unit_field(chunk_table, first, U_START), unit_field(chunk_table, first, U_LENGTH)
    slot = unit_field(chunk_table, first, U_SCALE)
    for chunk in tl.range(first, first + count, num_stages=STAGES):
        place = words + (start.to(tl.int64) * UNIT + BEFORE) * 4
        found = _chunk(place, height, length, m, levels, KIND, M)
        scale = tl.load(row_scales + slot * height + m, mask=m < height, other=0)
        sums = tl.dot(found, tl.trans(tl.load(source)), out_dtype=tl.int32)
        value = (_of_both_bytes(sums, M, TOKENS) + tl.load(totals)[None, :]).to(tl.float32)
        outputs += scale_values(scale, CODES)[:, None] * (tl.load(norms)[None, :] * value)
        following = tl.minimum(chunk + 1, first + count - 1)
        start, length = unit_field(chunk_table, following, U_START), unit_field(chunk_table, following, U_LENGTH)
        slot = unit_field(chunk_table, following, U_SCALE)
        source += 2 * CHUNK * COLUMNS * padded
        norms += padded
        totals += padded
    return outputs * level_unit(terms_of(KIND))


@triton.jit
def _singles_of_many(
    x, singles, order, factors, first, count, tokens, columns, height, m, token,
    CODES: tl.constexpr,
):  # fmt: skip
    """(M, TOKENS): the products of columns with a scale for each weight, of which `order` and `factors` are."""
    column = tl.arange(0, SINGLES)
    there = column < count
    place = singles + (first + column).to(tl.int64)[None, :] * height + m[:, None]
    weight = single_weight(place, there[None, :] & (m < height)[:, None], CODES)
    natural, factor = tl.load(order + column), tl.load(factors + column)
    wanted = there[:, None] & (token < tokens)[None, :]
    value = tl.load(x + token.to(tl.int64)[None, :] * columns + natural[:, None], mask=wanted, other=0).to(tl.float32)
    return tl.dot(weight, value * factor[:, None], input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def many_tokens(
    x, words, order, factors, row_scales, spans, chunk_table, levels, singles, inputs, norms, totals, counters, partial,
    y,
    tokens, padded, columns, rows, height,
    KINDS: tl.constexpr, CODES: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y = x W^T for a block of tokens, M rows and a span of columns, on tensor cores.

    Inputs are those of `scale_inputs`; `words` are bytes here.
    """
    place, unit, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, t = place * M + tl.arange(0, M), block * TOKENS + tl.arange(0, TOKENS)
    kind, first = unit_field(spans, unit, U_KIND), unit_field(spans, unit, U_START)
    count = unit_field(spans, unit, U_LENGTH)
    begin(EARLY)
    into = partial + unit.to(tl.int64) * tokens * rows if SPLIT else y
    wanted = (m < rows)[:, None] & (t < tokens)[None, :]
    offsets = t.to(tl.int64)[None, :] * rows + m[:, None]
    into += offsets
    for number in tl.static_range(len(KINDS)):
        if kind == number:
            outputs = _chunks_of_many(
                words, inputs, norms, totals, row_scales, chunk_table, levels, first, count, block, padded, height, m,
                kind_at(KINDS, number), CODES, M, TOKENS, STAGES,
            )  # fmt: skip
            tl.store(into, outputs.to(into.dtype.element_ty), mask=wanted)
    if kind == len(KINDS):
        order += unit_field(spans, unit, U_COLUMN)
        factors += unit_field(spans, unit, U_FACTOR)
        outputs = _singles_of_many(x, singles, order, factors, first, count, tokens, columns, height, m, t, CODES)
        tl.store(into, outputs.to(into.dtype.element_ty), mask=wanted)
    if SPLIT:
        zero = tl.zeros((M, TOKENS), tl.float32)
        add_up(partial, counters, y, offsets, wanted, tl.num_programs(1), tokens * rows, zero, 4)


@triton.jit
def _scaled(scales, source, stride, SLOT: tl.constexpr):
    """(rows, 32): what rows have for a slot times what columns have."""
    return scales[SLOT][:, None] * tl.load(source + SLOT * stride)


@triton.jit
def _weights(bits, shift, scales, source, stride, exact_levels, KIND: tl.constexpr, MEANS: tl.constexpr):
    """Weights (rows, 32) from words of their bits; `source` is where factors of the first slot are."""
    if has_trellis(KIND):
        number = (((bits[0] ^ bits[1] ^ bits[3]) >> shift) & 1) * 2 + ((bits[2] >> shift) & 1)
        for sign in tl.static_range(terms_of(KIND) - 1):
            number += ((bits[4 + sign] >> shift) & 1) << (terms_of(KIND) - sign)
        return tl.load(exact_levels + 32 * (terms_of(KIND) - 1) + number) * _scaled(scales, source, stride, 0)
    else:
        group = tl.zeros_like(bits[0])
        for plane in tl.static_range(planes_of(KIND) - terms_of(KIND)):
            group += ((bits[terms_of(KIND) + plane] >> shift) & 1) << plane
        result = tl.zeros(shift.shape, tl.float32)
        for own in tl.static_range(groups_of(KIND)):
            value = tl.zeros(shift.shape, tl.float32)
            for term in tl.static_range(terms_of(KIND)):
                sign = (((bits[term] >> shift) & 1) * 2 - 1).to(tl.float32)
                value += sign * _scaled(scales, source, stride, own * terms_of(KIND) + term)
            if MEANS:
                value += _scaled(scales, source, stride, groups_of(KIND) * terms_of(KIND) + own)
            result = tl.where(group == own, value, result)
        return result


@triton.jit
def _write_words(
    words, factors, row_scales, row_means, exact_levels, dense, fields, local, kept, columns, height, m,
    KIND: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    _, start, count, low, high, column, factor, stride, scale, mean = fields
    scales = slot_scales(row_scales, row_means, scale, mean, height, m, KIND, CODES, MEANS)
    size = planes_of(KIND) * height + BEFORE
    place = words + start.to(tl.int64) * UNIT + BEFORE + m[:, None]
    bit = tl.arange(0, COLUMNS)[None, :]
    shift = 16 * (bit // 4 % 2) + 4 * (bit % 4) + bit // 8
    into = dense + local.to(tl.int64)[:, None] * columns + whole_words(column) + bit
    source = factors + whole_words(factor) + bit
    for word in range(count):
        bits = loaded(place, height, kept[:, None], KIND, 1)
        value = _weights(bits, shift, scales, source, whole_words(stride), exact_levels, KIND, MEANS)
        value = value.to(dense.dtype.element_ty)
        # Of a word that two segments share each writes its own; all at once can be written in fewer steps.
        if (low <= word * COLUMNS) & (high >= (word + 1) * COLUMNS):
            tl.store(into, value, mask=kept[:, None])
        else:
            inside = (bit >= low - word * COLUMNS) & (bit < high - word * COLUMNS)
            tl.store(into, value, mask=kept[:, None] & inside)
        place += size
        into += COLUMNS
        source += COLUMNS


@triton.jit(do_not_specialize=["start"])  # as in `triton_matvec.few_tokens`
def dequantize(
    words, factors, row_scales, row_means, units, exact_levels, singles, dense,
    start, stop, columns, height,
    KINDS: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Dense weights (rows, columns) of rows [start, stop), columns in the order of `Prepared.order`.

    Program (rows, unit). What fills single columns up is not written.
    """
    local = tl.program_id(0) * M + tl.arange(0, M)
    m, kept = start + local, start + local < stop
    fields = unit_fields(units, tl.program_id(1))
    for number in tl.static_range(len(KINDS)):
        if fields[U_KIND] == number:
            _write_words(
                words, factors, row_scales, row_means, exact_levels, dense, fields, local, kept, columns, height, m,
                kind_at(KINDS, number), CODES, MEANS,
            )  # fmt: skip
    if fields[U_KIND] == len(KINDS):
        single = tl.arange(0, SINGLES)[None, :]
        there = kept[:, None] & (single < fields[U_LENGTH])
        weight = single_weight(singles + (fields[U_START] + single).to(tl.int64) * height + m[:, None], there, CODES)
        weight *= tl.load(factors + fields[U_FACTOR] + single, mask=single < fields[U_LENGTH], other=0)
        into = dense + local.to(tl.int64)[:, None] * columns + fields[U_COLUMN] + single
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
