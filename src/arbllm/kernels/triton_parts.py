"""What the Triton kernels share. Bodies see what TRITON_INTERPRET was when this was imported."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter knows no inline assembly and no products of bfloat16."""
FIELDS = tl.constexpr(13)
"""Fields of a `triton_layout.Run`."""


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
