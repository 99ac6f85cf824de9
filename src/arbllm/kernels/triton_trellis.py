"""Triton kernels for a matrix with a trellis code: products of a few tokens, of more, and weights written out.

For products, levels are bytes (see `triton_levels`), and inputs times column scales are whole numbers of 16 bits, as
two bytes each, scaled to the largest of those that are multiplied together. Sums of such products are exact. Row scales
come in afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.trellis_layout import CHUNK as _CHUNK
from arbllm.kernels.trellis_layout import ROWS_BEFORE, SINGLES_TOGETHER, WORD, Run, Unit
from arbllm.kernels.trellis_layout import UNIT as _UNIT
from arbllm.kernels.triton_levels import level_unit, quads
from arbllm.kernels.triton_parts import INTERPRETED, scale_values

LARGEST = tl.constexpr(32512.0)
"""The largest input as a whole number: its upper byte is 127 when it is rounded."""
TOGETHER = tl.constexpr(16)
"""Partial results that are on their way at a time."""
BEFORE, COLUMNS, UNIT = tl.constexpr(ROWS_BEFORE), tl.constexpr(WORD), tl.constexpr(_UNIT)
CHUNK, SINGLES = tl.constexpr(_CHUNK), tl.constexpr(SINGLES_TOGETHER)
FIELDS, UNIT_FIELDS = tl.constexpr(len(Run._fields)), tl.constexpr(len(Unit._fields))
RUN_TERMS, RUN_SEGMENT, RUN_START, RUN_WORDS, RUN_COLUMN, RUN_CHUNK = (
    tl.constexpr(Run._fields.index(name)) for name in ("terms", "segment", "start", "words", "column", "chunk")
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
def _first_word(fields, words):
    """Where first signs of the first row of a run's first word are."""
    return words + tl.load(fields + RUN_START).to(tl.int64) * UNIT + BEFORE


@triton.jit
def _loaded(place, height, there, TERMS: tl.constexpr, SCALE: tl.constexpr):
    """Words of first signs, those 16, 24 and 40 rows above, then those of the other signs; SCALE units to a word.

    Anything where they are not there: no use is made of it.
    """
    found = (
        tl.load(place, mask=there),
        tl.load(place - 16 * SCALE, mask=there),
        tl.load(place - 24 * SCALE, mask=there),
        tl.load(place - 40 * SCALE, mask=there),
    )
    for sign in tl.static_range(1, TERMS):
        found = found + (tl.load(place + sign * SCALE * height, mask=there),)
    return found


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
    largest = tl.max(tl.abs(value), 1)
    value *= tl.where(largest > 1e-30, LARGEST / tl.maximum(largest, 1e-30), 0.0)[:, None]
    whole = tl.floor(value + 0.5).to(tl.int32)
    upper = (whole + 128) >> 8
    high, low = _packed_bytes(upper, TOKENS, SPAN * 8), _packed_bytes(whole - (upper << 8), TOKENS, SPAN * 8)
    quad = tl.arange(0, SPAN * 8)[None, :]
    into = scratch + (quad // 8 * TOKENS + t[:, None]) * 8 + quad % 8
    tl.store(into, (low.to(tl.int64) << 32) | (high.to(tl.int64) & 0xFFFFFFFF))
    tl.store(scales + t, largest / LARGEST)
    tl.store(scales + TOKENS + t, tl.sum(whole, 1).to(tl.float32))


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
    signs = _loaded(place, height, own & (side < count), TERMS, 1)  # on their way while inputs are made ready
    scale = tl.load(row_scales + segment * height + m, mask=m < height, other=0)
    _begin(EARLY)
    _keep_inputs(
        x, order, factors, scratch, scales, tl.multiple_of(column, COLUMNS), count * COLUMNS, block * TOKENS, tokens,
        columns, TOKENS, SPAN,
    )  # fmt: skip
    tl.debug_barrier()
    sums = ()
    for _ in tl.static_range(2 * TOKENS):
        sums = sums + (tl.zeros((WORDS, M), tl.int32),)
    inputs = scratch + side * (TOKENS * 8)
    for word in range(0, count, WORDS):
        place += WORDS * size
        following = _loaded(place, height, own & (word + WORDS + side < count), TERMS, 1)
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
def _begin(EARLY: tl.constexpr):
    """Wait for the kernels before, if this one began before they ended; whatever they do not write was read by then."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        tl.debug_barrier()


@triton.jit
def _singles_of_few(
    x, singles, order, factors, into, first, count, block, tokens, columns, rows, height, m,
    CODES: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The products of columns with a scale for each weight, of which `order` and `factors` are."""
    column = tl.arange(0, SINGLES)
    there = column < count
    place = singles + (first + column).to(tl.int64)[:, None] * height + m[None, :]
    weight = _single_weight(place, there[:, None] & (m < height)[None, :], CODES)
    natural, factor = tl.load(order + column, mask=there, other=0), tl.load(factors + column, mask=there, other=0)
    _begin(EARLY)
    for t in tl.static_range(TOKENS):
        token = block * TOKENS + t
        value = tl.load(x + token.to(tl.int64) * columns + natural, mask=there & (token < tokens), other=0)
        total = tl.sum(weight * (value.to(tl.float32) * factor)[:, None], 0)
        tl.store(into + token.to(tl.int64) * rows + m, total, mask=(m < rows) & (token < tokens))


@triton.jit
def _single_weight(places, there, CODES: tl.constexpr):
    stored = tl.load(places, mask=there, other=0)
    value = scale_values(tl.abs(stored), CODES)
    return tl.where(stored < 0, -value, value)


@triton.jit
def _add_up(partial, counters, y, offsets, wanted, units, stride, ZERO):
    """The program that finds all others of its place done adds their results up, in their order, in float32."""
    tl.debug_barrier()
    counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    done = tl.atomic_add(counter, 1, sem="acq_rel")
    if done == units - 1:
        tl.store(counter, 0)
        total, source = ZERO, partial + offsets
        for unit in range(0, units, TOGETHER):
            for step in tl.static_range(TOGETHER):
                total += tl.load(source, mask=wanted & (unit + step < units), other=0, cache_modifier=".cg")
                source += stride
        tl.store(y + offsets, total.to(y.dtype.element_ty), mask=wanted)


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
    kind, start, count, column, segment = _unit(units, unit)
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
        _add_up(partial, counters, y, offsets, wanted, tl.num_programs(1), tokens * rows, zero)


@triton.jit
def _unit(units, number):
    """The fields of a `trellis_layout.Unit`."""
    fields = units + number * UNIT_FIELDS
    return tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)


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
    largest = tl.max(tl.abs(value), 0)
    value *= tl.where(largest > 1e-30, LARGEST / tl.maximum(largest, 1e-30), 0.0)
    whole = tl.floor(value + 0.5).to(tl.int32)
    upper = (whole + 128) >> 8
    word, quad = column // COLUMNS, column % COLUMNS // 4
    chunks = (words + CHUNK - 1) // CHUNK
    first = tl.load(fields + RUN_CHUNK) * (padded // TOKENS) + token // TOKENS * chunks
    place = ((first.to(tl.int64) + word // CHUNK) * 8 + quad) * (2 * TOKENS) + token % TOKENS
    into = bytes_of_inputs + place * 32 + word % CHUNK * 4 + column % 4
    there = column < chunks * CHUNK * COLUMNS
    tl.store(into, upper.to(tl.int8), mask=there)
    tl.store(into + TOKENS * 32, (whole - (upper << 8)).to(tl.int8), mask=there)
    tl.store(norms + run * padded + token, largest / LARGEST)
    tl.store(totals + run * padded + token, tl.sum(whole, 0).to(tl.float32))


@triton.jit
def _chunk(place, height, count, m, levels, TERMS: tl.constexpr):
    """The quads of a chunk of `count` words as operands of tensor cores: a tuple of int8 (M, 32)."""
    size = TERMS * height + BEFORE
    there = (m < height)[:, None]
    if INTERPRETED:
        w = tl.arange(0, 8)[None, :]
        signs = place.to(tl.pointer_type(tl.int32)) + m[:, None] + w * size
        found = _loaded(signs, height, there & (w < count), TERMS, 1)
        result = ()
        for quad in quads(found, levels, TERMS, False):
            parts = (quad[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
            result = result + (tl.reshape(parts, (quad.shape[0], 32)).to(tl.int8),)
        return result
    else:
        k = tl.arange(0, 32)[None, :]
        found = _loaded(
            place + (4 * m)[:, None] + (k // 4 * (4 * size) + k % 4), height, there & (k // 4 < count), TERMS, 4
        )
        return quads(found, levels, TERMS, True)


@triton.jit
def _run_of_many(
    words, inputs, norms, totals, row_scales, run_table, levels, run, outputs, block, padded, height, m,
    TERMS: tl.constexpr, CODES: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`outputs` (M, 2 TOKENS) with the products of one run added, those of upper bytes before those of lower ones."""
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
    return outputs + scale[:, None] * (norm[None, :] * (sums.to(tl.float32) + total[None, :]))


@triton.jit
def _singles_of_many(
    x, singles, order, factors, first, last, tokens, columns, height, m, token,
    CODES: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """(M, TOKENS): the products of columns with a scale for each weight."""
    column = first + tl.arange(0, SINGLES)
    there = column < last
    place = singles + column.to(tl.int64)[None, :] * height + m[:, None]
    weight = _single_weight(place, there[None, :] & (m < height)[:, None], CODES)
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
            sums = tl.zeros((M, 2 * TOKENS), tl.float32)
            for run in range(first, last):
                sums = _run_of_many(
                    words, inputs, norms, totals, row_scales, run_table, levels, run, sums, block, padded, height, m,
                    KINDS[number], CODES, M, TOKENS, STAGES,
                )  # fmt: skip
            outputs = tl.sum(tl.reshape(sums, (M, 2, TOKENS)), 1)
            tl.store(into, outputs.to(into.dtype.element_ty), mask=wanted)
    if kind == len(KINDS):
        outputs = _singles_of_many(
            x, singles, order + single_start, factors + single_start, first, last, tokens, columns, height, m, t,
            CODES, M, TOKENS,
        )  # fmt: skip
        tl.store(into, outputs.to(into.dtype.element_ty), mask=wanted)
    if SPLIT:
        zero = tl.zeros((M, TOKENS), tl.float32)
        _add_up(partial, counters, y, offsets, wanted, tl.num_programs(1), tokens * rows, zero)


@triton.jit
def _write_words(
    words, factors, row_scales, exact_levels, dense, start, count, column, segment, local, kept, columns, height, m,
    TERMS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    scale = scale_values(tl.load(row_scales + segment * height + m, mask=kept, other=0), CODES)
    size = TERMS * height + BEFORE
    place = words + start.to(tl.int64) * UNIT + BEFORE + m[:, None]
    bit, begin = tl.arange(0, COLUMNS)[None, :], tl.multiple_of(column, COLUMNS)
    shift = 16 * (bit // 4 % 2) + 4 * (bit % 4) + bit // 8
    into = dense + local.to(tl.int64)[:, None] * columns + begin + bit
    source = factors + begin + bit
    for _ in range(count):
        signs = _loaded(place, height, kept[:, None], TERMS, 1)
        number = (((signs[0] ^ signs[1] ^ signs[3]) >> shift) & 1) * 2 + ((signs[2] >> shift) & 1)
        for sign in tl.static_range(TERMS - 1):
            number += ((signs[4 + sign] >> shift) & 1) << (TERMS - sign)
        level = tl.load(exact_levels + 32 * (TERMS - 1) + number)
        value = level * (scale[:, None] * tl.load(source))
        tl.store(into, value.to(dense.dtype.element_ty), mask=kept[:, None])
        place += size
        into += COLUMNS
        source += COLUMNS


@triton.jit(do_not_specialize=["start"])  # likewise
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
    kind, first, count, column, segment = _unit(units, tl.program_id(1))
    for number in tl.static_range(len(KINDS)):
        if kind == number:
            _write_words(
                words, factors, row_scales, exact_levels, dense, first, count, column, segment, local, kept, columns,
                height, m, KINDS[number], CODES,
            )  # fmt: skip
    if kind == len(KINDS):
        single = tl.arange(0, SINGLES)[None, :]
        there = kept[:, None] & (single < count)
        weight = _single_weight(singles + (first + single).to(tl.int64) * height + m[:, None], there, CODES)
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
