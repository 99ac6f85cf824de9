"""What the Triton kernels share. Bodies see what TRITON_INTERPRET was when this was imported."""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.triton_plan import Run

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter knows no inline assembly and no products of bfloat16."""


def _field(name: str) -> tl.constexpr:
    """Where a row of `Prepared.run_table` has a field of `Run`."""
    return tl.constexpr(Run._fields.index(name))


FIELDS = tl.constexpr(len(Run._fields))
RUN_GROUPS = _field("groups")
RUN_TERMS = _field("terms")
RUN_WORDS = _field("words")
RUN_CHUNKS = _field("chunks")
RUN_COLUMN = _field("column")
RUN_LOW = _field("low")
RUN_HIGH = _field("high")
RUN_SLOT = _field("slot")
RUN_ROW_MEAN = _field("row_mean")
RUN_FACTOR = _field("factor")
RUN_WIDTH = _field("width")
RUN_TILE = _field("tile")
RUN_STOP = _field("stop")


@triton.constexpr_function
def planes_of(groups: int, terms: int) -> int:
    """Planes of bits of a kind, see `triton_plan.Kind.planes`."""
    return terms + groups.bit_length() - 1


@triton.jit
def exclusive_or(first, second):
    if INTERPRETED:
        return first ^ second
    else:
        return tl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [first, second], tl.int16, True, 2)


@triton.jit
def words_of_chunk(quarter, PLANES: tl.constexpr):
    """How many words lie from one chunk of a run to the next."""
    return quarter * PLANES * 16


@triton.jit
def words_of_run(fields, words, m, w, quarter, PLANES: tl.constexpr):
    """Addresses (M, words) of the first plane of a run's first chunks, `w` counting words over these, 16 in each."""
    start = words + tl.load(fields + RUN_WORDS).to(tl.int64) * 16
    return start + m[:, None] * 16 + (w // 16 * words_of_chunk(quarter, PLANES) + w % 16)[None, :]


@triton.jit
def plain_planes(words, valid, stride, GROUPS: tl.constexpr, TERMS: tl.constexpr):
    """A tuple of words: first signs, second signs, low and high bits of the group number, as far as there are any.

    `words` are the addresses (M, words) of those of the first plane, planes being `stride` apart.
    """
    found = ()
    for plane in tl.static_range(planes_of(GROUPS, TERMS)):
        found = found + (tl.load(words + plane * stride, mask=valid, other=0),)
    return found


@triton.jit
def scale_values(stored, CODES: tl.constexpr):
    """Scales in float32: codes of 8 bits as shares of their step, see docs/format.md."""
    if CODES:
        return tl.where(stored > 0, tl.exp2((stored.to(tl.float32) - 255.0) / 24.0), 0.0)
    else:
        return stored.to(tl.float32)


@triton.jit
def zeros(COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros((M, N), tl.float32),)
    return result


@triton.jit
def store_tokens(values, into, QUARTER: tl.constexpr, token, tokens, rows, quarter, m):
    """Write (M, TOKENS), the results of one of a word's four rows, to (tokens, rows)."""
    row = QUARTER * quarter + m
    inside = ((m < quarter) & (row < rows))[:, None] & (token < tokens)[None, :]
    places = into + token[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(places, values.to(into.dtype.element_ty), mask=inside)


@triton.jit
def add_up(
    partial, counters, y, place, block, parts, tokens, rows, quarter, m, token, M: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """The program that finds all others of its place done adds their results up, in their order, in float32."""
    tl.debug_barrier()
    done = tl.atomic_add(counters + block * tl.num_programs(0) + place, 1, sem="acq_rel")
    if done == parts - 1:
        for q in tl.static_range(4):
            row = q * quarter + m
            inside = (m < quarter) & (row < rows)
            where = token[None, :].to(tl.int64) * rows + row[:, None]
            wanted = inside[:, None] & (token < tokens)[None, :]
            total = tl.zeros((M, TOKENS), tl.float32)
            for part in range(parts):
                source = partial + part * tokens * rows
                total += tl.load(source + where, mask=wanted, other=0, cache_modifier=".cg")
            store_tokens(total, y, q, token, tokens, rows, quarter, m)
