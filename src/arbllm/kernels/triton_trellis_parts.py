"""What the Triton kernels for a matrix with a trellis share."""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels.triton_parts import INTERPRETED, scale_values
from arbllm.kernels.triton_trellis_layout import CHUNK as _CHUNK
from arbllm.kernels.triton_trellis_layout import ROWS_BEFORE, SINGLES_TOGETHER, WORD, Unit
from arbllm.kernels.triton_trellis_layout import UNIT as _UNIT

LARGEST = tl.constexpr(32512.0)
"""The largest input as a whole number: its upper byte is 127 when it is rounded."""
BEFORE, COLUMNS, UNIT = tl.constexpr(ROWS_BEFORE), tl.constexpr(WORD), tl.constexpr(_UNIT)
CHUNK, SINGLES = tl.constexpr(_CHUNK), tl.constexpr(SINGLES_TOGETHER)
FIELDS = tl.constexpr(len(Unit._fields))


@triton.jit
def unit_fields(units, number):
    """The fields of a `triton_trellis_layout.Unit`."""
    fields, found = units + number * FIELDS, ()
    for place in tl.static_range(FIELDS):
        found = found + (tl.load(fields + place),)
    return found


@triton.jit
def begin(EARLY: tl.constexpr):
    """Wait for the kernels before, if this one began before they ended; whatever they do not write was read by then."""
    if EARLY and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        tl.debug_barrier()


@triton.jit
def loaded(place, height, there, TERMS: tl.constexpr, SCALE: tl.constexpr):
    """Words of first signs, those 16, 24 and 40 rows above, then those of the other signs; SCALE units to a word.

    These are the rows that `arbllm.binarize.code` makes the last two bits of.
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
def whole_words(column):
    """A column that begins a word; so a compiler knows that it does."""
    return column // COLUMNS * COLUMNS


@triton.jit
def whole_numbers(values):
    """Values (tokens, k) as whole numbers of 16 bits, scaled to each token's largest; what one stands for; their sums.

    What one stands for is NaN where a value is, since whole numbers know none.
    """
    largest = tl.max(tl.abs(values), 1)
    share = tl.where(largest > 1e-30, LARGEST / tl.maximum(largest, 1e-30), 0.0)
    whole = tl.floor(values * share[:, None] + 0.5).to(tl.int32)
    lost = tl.sum((values != values).to(tl.int32), 1) > 0
    return whole, tl.where(lost, float("nan"), largest / LARGEST), tl.sum(whole, 1)


@triton.jit
def single_weight(places, there, CODES: tl.constexpr):
    stored = tl.load(places, mask=there, other=0)
    value = scale_values(tl.abs(stored), CODES)
    return tl.where(stored < 0, -value, value)


@triton.jit
def add_up(partial, counters, y, offsets, wanted, units, stride, ZERO, TOGETHER: tl.constexpr):
    """The program that finds all others of its place done adds their results up, in their order, in float32.

    TOGETHER of them are on their way at a time.
    """
    tl.debug_barrier()
    done = tl.atomic_add(counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), 1, sem="acq_rel")
    if done == units - 1:
        total, source = ZERO, partial + offsets
        for unit in range(0, units, TOGETHER):
            for step in tl.static_range(TOGETHER):
                total += tl.load(source, mask=wanted & (unit + step < units), other=0, cache_modifier=".cg")
                source += stride
        tl.store(y + offsets, total.to(y.dtype.element_ty), mask=wanted)
