"""What inputs are multiplied by, as bytes, from stored bits: words of 32 columns of a row, as `triton_layout` has them.

A word gives eight quads, quad q the bytes of columns 4 q to 4 q + 3, the first the lowest. Numbers are put together in
half-bytes, those of columns with the same bit of the half-byte at a time, and `prmt` looks up the bytes of four.

With a trellis they are levels: byte v stands for (v + 1/2) units, so that the byte of a level with all signs turned is
the same one, all bits turned. Without one, each group has quads of its own, 1, -1, or 0 where a weight is of another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arbllm.binarize.code import COEFFICIENTS
from arbllm.kernels.triton_layout import TURNED, level_words, unit_of
from arbllm.kernels.triton_parts import INTERPRETED, groups_of, terms_of

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
    """Where `Prepared.levels` has one of `_tables`."""
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


@triton.constexpr_function
def _signs_of(group: int, mean: bool, half: int) -> int:
    """Four bytes: of number s + 2 g, s the sign's bit and g the group, what that group's slot has; halves of eight."""
    bytes_of_numbers = [
        ((2 * (n % 2) - 1) if not mean else 1) * (n // 2 == group) for n in range(4 * half, 4 * half + 4)
    ]
    return int.from_bytes(bytes(byte & 255 for byte in bytes_of_numbers), "little", signed=True)


@triton.constexpr_function
def _lookup(low: int, high: int) -> str:
    return f"prmt.b32 $0, {low}, {high}, $1;"


@triton.jit
def _of_numbers(numbers, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Bytes of the numbers in the four lowest half-bytes (words, rows), of a table of eight."""
    if INTERPRETED:
        place = tl.arange(0, 4)[None, None, :]
        number = (numbers[:, :, None] >> (4 * place)) & 7
        value = tl.where(number < 4, LOW >> (8 * (number & 3)), HIGH >> (8 * (number & 3)))
        return tl.sum((value & 255) << (8 * place), 2)
    else:
        return tl.inline_asm_elementwise(_lookup(LOW, HIGH), "=r,r", [numbers], tl.int32, True, 1)


@triton.jit
def group_quads(planes, KIND: tl.constexpr, GROUP: tl.constexpr, TERM: tl.constexpr, MEAN: tl.constexpr):
    """The eight quads of one group and sign of some words, or of its mean: a tuple of int32.

    Args:
        planes: a tuple of words: first signs, second signs, low and high bits of the group number, as there are.
        KIND: of the columns, without a trellis.
        GROUP: the group.
        TERM: which sign.
        MEAN: whether the quads are 1 wherever a weight is of the group.
    """
    result = ()
    for quad in tl.static_range(8):
        numbers = (planes[TERM] >> (quad // 2)) & 0x11111111
        if groups_of(KIND) > 1:
            numbers |= ((planes[terms_of(KIND)] >> (quad // 2)) & 0x11111111) << 1
        if groups_of(KIND) > 2:
            numbers |= ((planes[terms_of(KIND) + 1] >> (quad // 2)) & 0x11111111) << 2
        numbers = numbers >> (16 * (quad % 2))
        result = result + (_of_numbers(numbers, _signs_of(GROUP, MEAN, 0), _signs_of(GROUP, MEAN, 1)),)
    return result


@triton.jit
def quads(signs, levels, TERMS: tl.constexpr, BYTES: tl.constexpr):
    """The eight quads of levels of some words with a trellis, a tuple.

    Args:
        signs: a tuple of words of first signs, those 16, 24 and 40 rows above, and of the other stored signs: int32, or
            all as bytes, the lowest first.
        levels: where `Prepared.levels` is.
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
