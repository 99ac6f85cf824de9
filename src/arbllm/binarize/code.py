"""A trellis code down the rows: one sign more for each weight than is stored.

A weight of k stored signs has k + 1 bits: its signs but the first, the second sign being the highest bit, then two bits
that follow from first signs. With u_i the first sign of row i in a column, 1 for + and 0 for -, and 0 above the matrix,
they are the outputs of a convolutional code over every eighth row,

    z1_i = u_i ^ u_(i - 16) ^ u_(i - 40),    z0_i = u_(i - 24),

the one with 32 states of G. Ungerboeck, Channel coding with multilevel/phase signals, 1982. The k + 1 bits, seen as
signs s_0 (the highest bit) to s_k, make the weight's level: sum over j of `coefficients[j]` * s_j, and, for three bits
and more, products of three signs. Levels ascend with the number that the bits make. Neighbouring levels have other last
bits, and what the code allows next depends on what was taken: a sequence of levels can be chosen to fit far better than
each for itself, as in trellis-coded quantization (M. Marcellin and T. Fischer, 1990).
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod

import torch
from torch import Tensor

ROWS_APART = 8
"""From one row of a code's sequence to the next; so many sequences lie side by side."""
MEMORY = 5
"""First signs that a weight's bits depend on, besides its own."""
STEPS = (0, 2, 3, 5)
"""How many rows of a sequence back the signs are that the code adds up."""
WINDOWS = 2 << MEMORY
"""Values of the first signs that a weight's bits depend on: bit 0 its own, bit t that of the t-th row before it."""

COEFFICIENTS = {
    1: (0.7698, 0.4522),
    2: (0.9286, 0.5385, 0.3063),
    3: (1.0421, 0.6223, 0.3511, 0.1845),
    4: (1.1850, 0.7237, 0.3955, 0.2054, 0.0928),
}
"""Of the signs, from the highest bit on, by the number of stored signs."""
PRODUCTS: dict[int, dict[tuple[int, int, int], float]] = {
    1: {},
    2: {(0, 1, 2): 0.0986},
    3: {(0, 1, 2): 0.1336, (0, 1, 3): 0.0739, (0, 2, 3): 0.0510, (1, 2, 3): 0.0444},
    4: {(0, 1, 2): 0.1566, (0, 1, 3): 0.0849, (0, 1, 4): 0.0282, (0, 2, 3): 0.0433, (1, 2, 3): 0.0362},
}
"""Of products of signs. All are such that levels represent a normal distribution with the least squared error that the
code and so few products allow, as `benchmarks/trellis_levels.py` finds them: 0.293, 0.083, 0.023 and 0.0065 of its
variance, where levels without a code have 0.363, 0.117, 0.035 and 0.0095 at the same bits (J. Max, Quantizing for
minimum distortion, 1960). A kernel needs a table look-up for each sign and each product."""


@cache
def level_values(terms: int) -> tuple[float, ...]:
    """All 2^(terms + 1) levels, ascending, each at the number that its bits make.

    Args:
        terms: stored signs of a weight, 1 to 4.
    """
    return tuple(
        sum(c * s for c, s in zip(COEFFICIENTS[terms], signs, strict=True))
        + sum(c * prod(signs[place] for place in places) for places, c in PRODUCTS[terms].items())
        for signs in product((-1, 1), repeat=terms + 1)
    )


def levels(terms: int, device: torch.device | None = None) -> Tensor:
    """`level_values` as a tensor, float32."""
    return torch.tensor(level_values(terms), dtype=torch.float32, device=device)


def first_level(terms: int) -> int:
    """Where the levels of weights of so many signs begin among those of all kinds."""
    return (2 << terms) - 4


def all_levels(device: torch.device | None = None) -> Tensor:
    """The levels of all kinds, those of the fewest signs first: float32 (60)."""
    values = [level for terms in sorted(COEFFICIENTS) for level in level_values(terms)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def window_bits(window: int) -> int:
    """2 z1 + z0 for first signs in bits 0 to MEMORY of `window`."""
    now, two, three, five = (window >> step & 1 for step in STEPS)
    return 2 * (now ^ two ^ five) + three


def derived_planes(signs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The bits z1 and z0 of some rows, from first signs.

    Args:
        signs: uint8 (n, bytes), packed or a value a byte: rows are combined bit by bit.
        rows: which rows.

    Returns:
        Two tensors like `signs[rows]`.
    """
    wanted = slice(*rows.indices(len(signs))[:2])
    now, two, three, five = (_rows_above(signs, wanted, ROWS_APART * steps) for steps in STEPS)
    return now ^ two ^ five, three


def _rows_above(signs: Tensor, rows: slice, distance: int) -> Tensor:
    start, stop = rows.start - distance, rows.stop - distance
    found = signs[max(start, 0) : max(stop, 0)]
    missing = rows.stop - rows.start - len(found)
    return torch.cat([found.new_zeros(missing, *found.shape[1:]), found]) if missing else found
