"""What the Triton kernels share. Bodies see what TRITON_INTERPRET was when this was imported."""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.kernels import triton_plan
from arbllm.kernels.triton_plan import ROWS_BEFORE, SINGLES_TOGETHER, WORD, Kind, Unit

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter knows no inline assembly, and nothing of other kernels."""
LARGEST = tl.constexpr(32512.0)
"""The largest input as a whole number: its upper byte is 127 when it is rounded."""
BEFORE, COLUMNS, UNIT = tl.constexpr(ROWS_BEFORE), tl.constexpr(WORD), tl.constexpr(triton_plan.UNIT)
CHUNK, SINGLES = tl.constexpr(triton_plan.CHUNK), tl.constexpr(SINGLES_TOGETHER)
FIELDS = tl.constexpr(len(Unit._fields))
U_KIND, U_START, U_LENGTH, U_LOW, U_HIGH, U_COLUMN, U_FACTOR, U_STRIDE, U_SCALE, U_MEAN = (
    tl.constexpr(Unit._fields.index(name))
    for name in ("kind", "start", "length", "low", "high", "column", "factor", "stride", "scale", "mean")
)
"""Where a unit has its fields."""


@triton.constexpr_function
def kind_at(kinds: tuple[tuple[int, int, bool], ...], number: int) -> tuple[int, int, bool]:
    """One of some kinds, as functions of kernels take it."""
    return kinds[number]


@triton.constexpr_function
def groups_of(kind: tuple[int, int, bool]) -> int:
    """See `triton_plan.Kind`; likewise the others."""
    return kind[0]


@triton.constexpr_function
def terms_of(kind: tuple[int, int, bool]) -> int:
    """Stored signs of a weight."""
    return kind[1]


@triton.constexpr_function
def has_trellis(kind: tuple[int, int, bool]) -> bool:
    """Whether signs are those of a trellis code."""
    return kind[2]


@triton.constexpr_function
def planes_of(kind: tuple[int, int, bool]) -> int:
    """Stored bits of a weight."""
    return Kind(*kind).planes


@triton.constexpr_function
def slots_of(kind: tuple[int, int, bool], means: bool) -> int:
    """Products of a weight's bits."""
    return Kind(*kind).slots(means)


@triton.jit
def unit_field(units, number, FIELD: tl.constexpr):
    """A field of a `triton_plan.Unit`."""
    return tl.load(units + number * FIELDS + FIELD)


@triton.jit
def unit_fields(units, number):
    """All fields of a `triton_plan.Unit`."""
    found = ()
    for place in tl.static_range(FIELDS):
        found = found + (unit_field(units, number, place),)
    return found


@triton.jit
def begin(EARLY: tl.constexpr):
    """Wait for the kernels before, if this one began before they ended.

    What is read before it, no launch may have written that is not at least two launches back.
    """
    if EARLY and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        tl.debug_barrier()


@triton.jit
def loaded(place, height, there, KIND: tl.constexpr, SCALE: tl.constexpr):
    """Words of first signs, then those of the other planes; SCALE units to a word.

    With a trellis, behind first signs those 16, 24 and 40 rows above, the rows that `arbllm.binarize.code` makes the
    last two bits of. Anything where they are not there: no use is made of it.
    """
    found = (tl.load(place, mask=there),)
    if has_trellis(KIND):
        found = found + (
            tl.load(place - 16 * SCALE, mask=there),
            tl.load(place - 24 * SCALE, mask=there),
            tl.load(place - 40 * SCALE, mask=there),
        )
    for plane in tl.static_range(1, planes_of(KIND)):
        found = found + (tl.load(place + plane * SCALE * height, mask=there),)
    return found


@triton.jit
def whole_words(column):
    """A column that begins a word; so a compiler knows that it does."""
    return column // COLUMNS * COLUMNS


@triton.jit
def whole_numbers(values):
    """Values (tokens, k) as whole numbers of 16 bits, scaled to each token's largest; what one stands for; their sums.

    What one stands for is NaN where a value is NaN or infinite, since whole numbers know neither.
    """
    largest = tl.max(tl.abs(values), 1)
    share = tl.where(largest > 1e-30, LARGEST / tl.maximum(largest, 1e-30), 0.0)
    whole = tl.floor(values * share[:, None] + 0.5).to(tl.int32)
    lost = (tl.sum((values != values).to(tl.int32), 1) > 0) | (largest == float("inf"))
    return whole, tl.where(lost, float("nan"), largest / LARGEST), tl.sum(whole, 1)


@triton.jit
def scale_values(stored, CODES: tl.constexpr):
    """Scales in float32: codes of 8 bits as shares of their step, see docs/format.md."""
    if CODES:
        return tl.where(stored > 0, tl.exp2((stored.to(tl.float32) - 255.0) / 24.0), 0.0)
    else:
        return stored.to(tl.float32)


@triton.jit
def slot_scales(
    row_scales, row_means, scale, mean, height, m, KIND: tl.constexpr, CODES: tl.constexpr, MEANS: tl.constexpr
):
    """What the products of each slot are multiplied by, for rows `m`: a tuple of float32 (rows)."""
    own, result = m < height, ()
    for slot in tl.static_range(slots_of(KIND, False)):
        stored = tl.load(row_scales + (scale + slot) * height + m, mask=own, other=0)
        result = result + (scale_values(stored, CODES),)
    for group in tl.static_range(slots_of(KIND, MEANS) - slots_of(KIND, False)):
        stored = tl.load(row_means + (mean + group) * height + m, mask=own, other=0)
        result = result + (stored.to(tl.float32),)
    return result


@triton.jit
def single_weight(places, there, CODES: tl.constexpr):
    """Columns with a scale for each weight."""
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
