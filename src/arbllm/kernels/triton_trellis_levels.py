"""Levels of a trellis as bytes, from stored bits: words as `triton_trellis_layout` has them, 32 columns of a row each.

Byte v stands for (v + 1/2) units, so that the byte of a level with all signs turned is the same one, all bits turned.
A word gives eight quads, quad q the bytes of columns 4 q to 4 q + 3, the first the lowest. The numbers of their levels
are put together in half-bytes, those of columns with the same bit of the half-byte at a time, and `prmt` looks up four.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.binarize.code import COEFFICIENTS
from arbllm.kernels.triton_parts import INTERPRETED
from arbllm.kernels.triton_trellis_layout import TURNED, level_words, unit_of

SECOND, THIRD = "$12", "$13"
"""Operands of `_assembly`."""
_WORDS = tuple(tuple(level_words(terms)) for terms in sorted(COEFFICIENTS))
_UNITS = tuple(unit_of(terms) for terms in sorted(COEFFICIENTS))


@triton.constexpr_function
def level_unit(terms: int) -> float:
    """What a whole level of so many stored signs stands for."""
    return _UNITS[terms - 1]


@triton.constexpr_function
def _constraints(terms: int, tables: int) -> str:
    return ",".join(["=&r"] * 8 + ["r"] * (4 + terms - 1 + tables))


@triton.constexpr_function
def _assembly(terms: int, inline: bool) -> str:
    """From first signs of a word's row and of 16, 24 and 40 rows above, in $8 to $11, to the quads in $0 to $7."""
    tables = [str(word) if inline else f"${11 + terms + place}" for place, word in enumerate(_tables(terms))]
    lines = [".reg .b32 high, low, even, odd, more, swapped, turned, n0, n1, n2, n3;"]
    lines += ["lop3.b32 high, $8, $9, $11, 0x96;", "mov.b32 low, $10;"]
    if terms > 2:  # all signs are turned where the first one is -
        lines += [_agreeing("high", "high"), _agreeing("low", "low"), _agreeing("more", f"${10 + terms}")]
    elif terms == 2:
        lines += [f"mov.b32 more, {SECOND};"]
    if terms == 4:
        lines += [_agreeing("swapped", THIRD)]
    lines += ["shl.b32 n0, high, 1;", "lop3.b32 even, low, n0, 0x55555555, 0xE4;"]
    lines += ["shr.u32 n0, low, 1;", "lop3.b32 odd, n0, high, 0x55555555, 0xE4;"]
    lines += ["and.b32 n0, even, 0x33333333;", "and.b32 n1, odd, 0x33333333;"]
    lines += ["shr.u32 even, even, 2;", "shr.u32 odd, odd, 2;"]
    lines += ["and.b32 n2, even, 0x33333333;", "and.b32 n3, odd, 0x33333333;"]
    for bit in range(4):
        if terms > 1:
            lines += [_moved("even", "more", 2 - bit), f"lop3.b32 n{bit}, n{bit}, even, 0x44444444, 0xF8;"]
        if terms > 3:
            lines += [_moved("even", "swapped", 3 - bit), f"lop3.b32 n{bit}, n{bit}, even, 0x88888888, 0xF8;"]
        for half in range(2):
            lines += _looked_up(terms, bit, half, tables)
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _agreeing(into: str, word: str) -> str:
    """Where signs agree with the second one, which is the first that makes a level."""
    return f"lop3.b32 {into}, {word}, {SECOND}, 0, 0xC3;"


@triton.constexpr_function
def _moved(into: str, word: str, places: int) -> str:
    return f"shl.b32 {into}, {word}, {places};" if places >= 0 else f"shr.u32 {into}, {word}, {-places};"


@triton.constexpr_function
def _tables(terms: int) -> tuple[int, ...]:
    """Constants of `_assembly`: bytes of levels, and to turn them."""
    return _WORDS[terms - 1][: 4 if terms == 4 else 2] + (TURNED if terms > 2 else ())


@triton.constexpr_function
def _place(terms: int, constant: int) -> int:
    """Where `PreparedTrellis.levels` has one of `_tables`."""
    levels = 4 if terms == 4 else 2
    return 4 * (terms - 1) + constant if constant < levels else 16 + constant - levels


@triton.constexpr_function
def _looked_up(terms: int, bit: int, half: int, tables: list[str]) -> list[str]:
    quad = f"${2 * bit + half}"
    lines = [f"shr.u32 n{bit}, n{bit}, 16;"] if half else []
    lines += [f"prmt.b32 {quad}, {tables[0]}, {tables[1]}, n{bit};"]
    if terms == 4:  # a number's highest bit makes `prmt` repeat the sign of the byte, which is 0 in these tables
        lines += [f"xor.b32 even, n{bit}, 0x88888888;", f"prmt.b32 odd, {tables[2]}, {tables[3]}, even;"]
        lines += [f"or.b32 {quad}, {quad}, odd;"]
    if terms > 2:
        shift = 16 * half + (3 if bit == 3 else 0)
        mask = tables[bit % 3 - 3]
        lines += [f"shr.u32 even, {SECOND}, {shift};", f"prmt.b32 turned, {mask}, {'0' if bit == 2 else mask}, even;"]
        lines += [f"xor.b32 {quad}, {quad}, turned;"]
    return lines


@triton.jit
def _interpreted(signs, levels, TERMS: tl.constexpr):
    """The quads in int32, as `_assembly` makes them."""
    high, low = signs[0] ^ signs[1] ^ signs[3], signs[2]
    result = ()
    for quad in tl.static_range(8):
        word = tl.zeros(signs[0].shape, tl.int32)
        for place in tl.static_range(4):
            shift = 16 * (quad % 2) + 4 * place + quad // 2
            number = ((high >> shift) & 1) * 2 + ((low >> shift) & 1)
            for sign in tl.static_range(TERMS - 1):
                number += ((signs[4 + sign] >> shift) & 1) * (1 << (TERMS - sign))
            turned = (TERMS > 2) & (number < (1 << TERMS))
            number = tl.where(turned, (2 << TERMS) - 1 - number, number)
            if TERMS > 2:
                number -= 1 << TERMS
            value = tl.load(levels.to(tl.pointer_type(tl.int8)) + 16 * (TERMS - 1) + number).to(tl.int32)
            word |= (tl.where(turned, -1 - value, value) & 255) << (8 * place)
        result = result + (word,)
    return result


@triton.jit
def quads(signs, levels, TERMS: tl.constexpr, BYTES: tl.constexpr):
    """The eight quads of some words, a tuple.

    Args:
        signs: a tuple of words of first signs, those 16, 24 and 40 rows above, and of the other stored signs: int32, or
            all as bytes, the lowest first.
        levels: where `PreparedTrellis.levels` is.
        TERMS: stored signs of a weight.
        BYTES: whether words and quads are bytes.
    """
    if INTERPRETED:
        return _interpreted(signs, levels, TERMS)
    elif BYTES:
        return tl.inline_asm_elementwise(_assembly(TERMS, True), _constraints(TERMS, 0), signs, (tl.int8,) * 8, True, 4)
    else:
        tables = ()
        for place in tl.static_range(len(_tables(TERMS))):
            tables = tables + (tl.load(levels + _place(TERMS, place)),)
        return tl.inline_asm_elementwise(
            _assembly(TERMS, False),
            _constraints(TERMS, len(_tables(TERMS))),
            signs + tables,
            (tl.int32,) * 8,
            True,
            1,
        )
