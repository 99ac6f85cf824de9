"""Triton kernels for a few tokens: the product of bit planes with activations on tensor cores, straight from the bits.

With b a bit of a weight's sign and g its group, chi_h(g) = +1 or -1 the Walsh functions of the group number, and z_a
the inputs times the column scales of group a,

    sum over weights of group a of sign z_a = 1/G sum_h chi_h(a) sum_j sign_j chi_h(g_j) z_a,j

and each sign chi_h(g) is again one bit: the exclusive or of the sign with bits of the group number. So a matrix of one
sign and two groups takes two products of bits with a thin matrix, whose columns are the tokens times the groups. Row
scales come in afterwards, once a run of columns. Bits are 0 or a power of two (see `triton_layout`), not -1 or +1,
which the sum of the inputs corrects.
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
    RUN_TERMS,
    RUN_TILE,
    RUN_WIDTH,
    add_up,
    exclusive_or,
    plain_planes,
    planes_of,
    scale_values,
    store_tokens,
    words_of_chunk,
    words_of_run,
    zeros,
)

LARGEST = tl.constexpr(32768.0)
"""Inputs of a run are scaled to this, so that float16 holds them to 11 bits, down to 2^-26 of the largest."""
RESIDUAL = tl.constexpr(2048.0)


@triton.constexpr_function
def _mask_assembly(bit: int) -> str:
    return f"and.b32 $0, $1, 0x{(1 << bit) * 0x10001:08x};"


@triton.jit
def masked(words, BIT: tl.constexpr):
    """One bit of each word as float16: 0 or 2^(BIT - 24)."""
    if INTERPRETED:
        return (words & (1 << BIT)).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(_mask_assembly(BIT), "=r,r", [words], tl.float16, True, 2)


@triton.jit
def upper_bits(words):
    """Bits 12 to 15 in the place of bits 8 to 11; the bits above are another word's, and of no use."""
    if INTERPRETED:
        return words >> 4
    else:
        return tl.inline_asm_elementwise("shr.b32 $0, $1, 4;", "=r,r", [words], tl.int16, True, 2)


@triton.jit
def walsh(H: tl.constexpr, group):
    """chi_H(group), float32: +1 where H and the group number share an even number of bits."""
    shared = H & group
    return 1.0 - 2.0 * ((shared ^ (shared >> 1)) & 1).to(tl.float32)


@triton.jit(do_not_specialize=["runs", "tiles", "tokens", "counts"])  # as in `few_tokens`
def scale_inputs(
    x,
    order,
    column_scales,
    steps,
    run_table,
    z,
    norms,
    sums,
    counters,
    runs,
    tiles,
    tokens,
    columns,
    counts,
    SCALED: tl.constexpr,
    CODES: tl.constexpr,
    MEANS: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    N: tl.constexpr,
    SLICE: tl.constexpr,
    MOST_TILES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Inputs in the order of the words, times column scales, as float16 scaled to the largest of each run.

    Program (run, tile, slice of the N columns of a block of tokens). Column n is token ``n % TOKENS`` in part ``n //
    TOKENS % PARTS`` of group ``n // (PARTS TOKENS)``; of float32 inputs the second part is what the first leaves.
    """
    run, tile = tl.program_id(0), tl.program_id(1)
    block = tl.program_id(2) // (N // SLICE)
    n = (tl.program_id(2) % (N // SLICE)) * SLICE + tl.arange(0, SLICE)
    if (run == 0) & (tile == 0):
        for start in range(0, counts, 128):
            places = start + tl.arange(0, 128)
            tl.store(counters + block * counts + places, tl.zeros((128,), tl.int32), mask=places < counts)
    fields = run_table + run * FIELDS
    if run < runs:
        groups, terms = tl.load(fields + RUN_GROUPS), tl.load(fields + RUN_TERMS)
        used = terms + MEANS if SCALED else 1
        if tile < used:
            chunks, start = tl.load(fields + RUN_CHUNKS), tl.load(fields + RUN_COLUMN)
            low, high = tl.load(fields + RUN_LOW), tl.load(fields + RUN_HIGH)
            k = tl.arange(0, SPAN * 64)
            inside = (k >= low) & (k < high)
            part, group = n // TOKENS % PARTS, n // (PARTS * TOKENS)
            token = block * TOKENS + n % TOKENS
            natural = tl.load(order + start + k, mask=inside, other=0)
            wanted = inside[:, None] & (token < tokens)[None, :]
            if SCALED:
                plain = tile == terms  # for row means
                wanted = wanted & ((group < groups) & ((group == 0) | (tile < terms)))[None, :]
            else:
                wanted = wanted & (group == 0)[None, :]
            value = tl.load(x + token[None, :].to(tl.int64) * columns + natural[:, None], mask=wanted, other=0)
            value = value.to(tl.float32)
            if SCALED:
                slot = group * terms + tile
                place = tl.load(fields + RUN_FACTOR) + slot[None, :] * tl.load(fields + RUN_WIDTH) + k[:, None]
                factor = scale_values(tl.load(column_scales + place, mask=wanted & (tile < terms), other=0), CODES)
                if CODES:
                    step = tl.load(
                        steps + tl.load(fields + RUN_SLOT) + slot, mask=(group < groups) & (tile < terms), other=0
                    )
                    factor *= step.to(tl.float32)[None, :]
                value = tl.where(plain, value, value * factor)
            largest = tl.max(tl.abs(value), 0)
            value = value * tl.where(largest > 1e-30, LARGEST / tl.maximum(largest, 1e-30), 0.0)[None, :]
            rounded = value.to(tl.float16).to(tl.float32)
            norm = largest / LARGEST
            if PARTS == 2:
                rounded = tl.where(
                    (part == 1)[None, :], ((value - rounded) * RESIDUAL).to(tl.float16).to(tl.float32), rounded
                )
                norm = tl.where(part == 1, norm / RESIDUAL, norm)
            where = (block * runs + run) * MOST_TILES + tile
            tl.store(norms + where * N + n, norm)
            tl.store(sums + where * N + n, tl.sum(rounded, 0))
            first = block * tiles + tl.load(fields + RUN_TILE)
            row = (first + k // 64 * used + tile).to(tl.int64) * 64 + k % 64
            bit = k % 64 // 16
            scaled = (
                rounded * tl.where(bit == 0, 1.0, tl.where(bit == 1, 0.5, tl.where(bit == 2, 0.25, 0.125)))[:, None]
            )
            tl.store(z + row[:, None] * N + n[None, :], scaled.to(tl.float16), mask=(k < chunks * 64)[:, None])


@triton.jit
def _planes(words, valid, stride, m, quarter, GROUPS: tl.constexpr, TERMS: tl.constexpr):
    """Words of sign chi_h(g), term-major, then those of chi_h(g) alone for h of 1 and above: a tuple."""
    stored = plain_planes(words, valid & (m < quarter)[:, None], stride, GROUPS, TERMS)
    first = stored[0]
    found = (first,)
    if GROUPS > 1:
        low = stored[TERMS]
        found = found + (exclusive_or(first, low),)
    if GROUPS > 2:
        high = stored[TERMS + 1]
        both = exclusive_or(low, high)
        found = found + (exclusive_or(first, high), exclusive_or(first, both))
    if TERMS > 1:
        second = stored[1]
        found = found + (second,)
        if GROUPS > 1:
            found = found + (exclusive_or(second, low),)
        if GROUPS > 2:
            found = found + (exclusive_or(second, high), exclusive_or(second, both))
    if GROUPS > 1:
        found = found + (low,)
    if GROUPS > 2:
        found = found + (high, both)
    return found


@triton.jit
def _bit_products(words, inputs, total, QUARTER: tl.constexpr):
    """Add the products of the four bits of one of the words' rows with the inputs of their columns, a tuple."""
    source = upper_bits(words) if QUARTER == 3 else words
    for bit in tl.static_range(4):
        total = tl.dot(masked(source, 4 * (QUARTER if QUARTER < 3 else 2) + bit), inputs[bit], total)
    return total


@triton.jit
def _multiply(sums, words, inputs, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Add the products of COUNT planes from FIRST with inputs to a tuple of sums, four a plane for the words' rows."""
    result = ()
    for place in tl.static_range(len(sums)):
        if (place >= 4 * FIRST) & (place < 4 * (FIRST + COUNT)):
            result = result + (_bit_products(words[place // 4], inputs, sums[place], place % 4),)
        else:
            result = result + (sums[place],)
    return result


@triton.jit
def _transformed(sums, FIRST: tl.constexpr, START: tl.constexpr, GROUPS: tl.constexpr, QUARTER: tl.constexpr, group):
    """sum over h from START of chi_h(group) times the sum of plane FIRST + h - START, bits counted as 0 and 1."""
    result = sums[4 * FIRST + QUARTER] * walsh(START, group)
    for h in tl.static_range(START + 1, GROUPS):
        result += sums[4 * (FIRST + h - START) + QUARTER] * walsh(h, group)
    # The masked bits of a word's quarter are 2^(4 QUARTER - 24) and up; those of the last quarter were shifted.
    return result * (2.0 / GROUPS * 2.0 ** (24 - 4 * (QUARTER if QUARTER < 3 else 2)))


@triton.jit
def _products_of_run(
    fields, words, z, block, tiles, quarter, m,
    GROUPS: tl.constexpr, TERMS: tl.constexpr, SCALED: tl.constexpr, MEANS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The products of one run's planes with its inputs: a tuple of (M, N), four a plane for the words' rows."""
    PLANES: tl.constexpr = GROUPS * TERMS
    OTHERS: tl.constexpr = GROUPS - 1 if MEANS else 0
    USED: tl.constexpr = TERMS + MEANS if SCALED else 1
    BITS: tl.constexpr = planes_of(GROUPS, TERMS)
    chunks = tl.load(fields + RUN_CHUNKS)
    first_tile = block * tiles + tl.load(fields + RUN_TILE)
    w, n = tl.arange(0, WORDS), tl.arange(0, N)
    own = words_of_run(fields, words, m, w, quarter, BITS)
    inputs = z + (first_tile.to(tl.int64) + w // 16 * USED)[:, None] * (64 * N) + (w % 16)[:, None] * N + n[None, :]
    products = zeros(4 * (PLANES + OTHERS), M, N)
    for chunk in range(0, chunks, WORDS // 16):
        valid = (chunk + w // 16) < chunks
        first = own + chunk * words_of_chunk(quarter, BITS)
        planes = _planes(first, valid[None, :], quarter * 16, m, quarter, GROUPS, TERMS)
        for tile in tl.static_range(USED):
            tokens = ()
            for bit in tl.static_range(4):
                place = inputs + (chunk * USED + tile) * (64 * N) + bit * (16 * N)
                tokens = tokens + (tl.load(place, mask=valid[:, None], other=0),)
            if SCALED & (tile < TERMS):
                products = _multiply(products, planes, tokens, tile * GROUPS, GROUPS)
            elif SCALED:
                products = _multiply(products, planes, tokens, PLANES, OTHERS)
            else:
                products = _multiply(products, planes, tokens, 0, PLANES + OTHERS)
    return products


@triton.jit
def _one_run(
    fields, words, z, norms, sums, row_scales, steps, row_means, block, run, runs, tiles, rows, quarter, m, outputs,
    GROUPS: tl.constexpr, TERMS: tl.constexpr,
    SCALED: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr,
    COLUMNS: tl.constexpr, MOST_TILES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`outputs`, a tuple of four (M, N) for the rows of a word, with one run of columns added."""
    PLANES: tl.constexpr = GROUPS * TERMS
    n = tl.arange(0, N)
    products = _products_of_run(fields, words, z, block, tiles, quarter, m, GROUPS, TERMS, SCALED, MEANS, M, N, WORDS)
    result = ()
    for place in tl.static_range(4):
        row = place * quarter + m
        inside = (m < quarter) & (row < rows)
        output = outputs[place]
        for term in tl.static_range(TERMS):
            where = ((block * runs + run) * MOST_TILES + (term if SCALED else 0)) * N + n
            norm, total = tl.load(norms + where), tl.load(sums + where)
            slot = row_scales + tl.load(fields + RUN_SLOT).to(tl.int64) * rows + term * rows + row
            if SCALED:
                group = n // COLUMNS
                scales = tl.zeros((M, N), tl.float32)
                for g in tl.static_range(GROUPS):
                    scale = scale_values(tl.load(slot + g * TERMS * rows, mask=inside, other=0), CODES)
                    scales = tl.where((group == g)[None, :], scale[:, None], scales)
                value = _transformed(products, term * GROUPS, 0, GROUPS, place, group[None, :])
                output += scales * norm[None, :] * (value - tl.where(group == 0, total, 0.0)[None, :])
            else:
                for g in tl.static_range(GROUPS):
                    scale = scale_values(tl.load(slot + g * TERMS * rows, mask=inside, other=0), CODES)
                    if CODES:
                        scale *= tl.load(steps + tl.load(fields + RUN_SLOT) + g * TERMS + term).to(tl.float32)
                    value = _transformed(products, term * GROUPS, 0, GROUPS, place, tl.full((1, N), g, tl.int32))
                    if g == 0:
                        value -= total[None, :]
                    output += scale[:, None] * norm[None, :] * value
        if MEANS:
            where = ((block * runs + run) * MOST_TILES + (TERMS if SCALED else 0)) * N + n
            norm, total = tl.load(norms + where), tl.load(sums + where)
            slot = row_means + tl.load(fields + RUN_ROW_MEAN).to(tl.int64) * rows + row
            for g in tl.static_range(GROUPS):
                mean = tl.load(slot + g * rows, mask=inside, other=0).to(tl.float32)
                value = tl.zeros((M, N), tl.float32)
                if GROUPS > 1:
                    value -= _transformed(products, PLANES, 1, GROUPS, place, tl.full((1, N), g, tl.int32))
                if g == 0:
                    value += total[None, :]
                output += mean[:, None] * norm[None, :] * value
        result = result + (output,)
    return result


@triton.jit
def _single_columns(
    x, singles, single_columns, column_scales, steps, first, last, block, count, columns, tokens, rows, quarter, m,
    SCALED: tl.constexpr, CODES: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Four (M, TOKENS): columns [first, last) of those that have a scale for each weight."""
    token = block * TOKENS + tl.arange(0, TOKENS)
    outputs = zeros(4, M, TOKENS)
    for start in range(first, last, 16):
        column = start + tl.arange(0, 16)
        valid = column < last
        natural = tl.load(single_columns + column, mask=valid, other=0)
        wanted = valid[:, None] & (token < tokens)[None, :]
        inputs = tl.load(x + token[None, :].to(tl.int64) * columns + natural[:, None], mask=wanted, other=0).to(
            tl.float32
        )
        if SCALED:
            factor = tl.load(single_columns + 2 * count + column, mask=valid, other=0)
            inputs *= scale_values(tl.load(column_scales + factor, mask=valid, other=0), CODES)[:, None]
        if CODES:
            slot = tl.load(single_columns + count + column, mask=valid, other=0)
            inputs *= tl.load(steps + slot, mask=valid, other=0).to(tl.float32)[:, None]
        result = ()
        for place in tl.static_range(4):
            row = place * quarter + m
            inside = ((m < quarter) & (row < rows))[:, None] & valid[None, :]
            stored = tl.load(singles + column[None, :].to(tl.int64) * rows + row[:, None], mask=inside, other=0)
            value = scale_values(tl.abs(stored), CODES)
            value = tl.where(stored < 0, -value, value)
            result = result + (tl.dot(value, inputs, outputs[place], input_precision="ieee"),)
        outputs = result
    return outputs


# Compiling takes seconds, so that there are no kernels for numbers that are 1 or multiples of 16 in some layers alone.
@triton.jit(do_not_specialize=["runs", "tiles", "tokens", "count"])
def few_tokens(
    x, words, z, norms, sums, row_scales, row_means, run_table, units, singles, single_columns, column_scales, steps,
    partial, counters, y,
    runs, tiles, tokens, columns, rows, quarter, count,
    KINDS: tl.constexpr, SCALED: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr, PARTS: tl.constexpr,
    SPLIT: tl.constexpr, MOST_TILES: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """y = x W^T for a block of tokens, 4 M rows and one unit of columns; the last program of a place adds them up."""
    place, unit, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = place * M + tl.arange(0, M)
    token = block * TOKENS + tl.arange(0, TOKENS)
    kind, first, last = tl.load(units + 3 * unit), tl.load(units + 3 * unit + 1), tl.load(units + 3 * unit + 2)
    into = partial + unit * tokens * rows if SPLIT else y
    for number in tl.static_range(len(KINDS)):
        if kind == number:
            outputs = zeros(4, M, N)
            for run in range(first, last):
                outputs = _one_run(
                    run_table + run * FIELDS, words, z, norms, sums, row_scales, steps, row_means, block, run, runs,
                    tiles, rows, quarter, m, outputs, KINDS[number][0], KINDS[number][1], SCALED,
                    CODES, MEANS, PARTS * TOKENS, MOST_TILES, M, N, WORDS,
                )  # fmt: skip
            for q in tl.static_range(4):
                values = tl.sum(tl.reshape(outputs[q], (M, N // TOKENS, TOKENS)), 1)
                store_tokens(values, into, q, token, tokens, rows, quarter, m)
    if kind == len(KINDS):
        outputs = _single_columns(
            x, singles, single_columns, column_scales, steps, first, last, block, count, columns, tokens, rows, quarter,
            m, SCALED, CODES, TOKENS, M,
        )  # fmt: skip
        for q in tl.static_range(4):
            store_tokens(outputs[q], into, q, token, tokens, rows, quarter, m)
    if SPLIT:
        add_up(partial, counters, y, place, block, tl.num_programs(1), tokens, rows, quarter, m, token, M, TOKENS)
