import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arbllm.binarize.code import (
    COEFFICIENTS,
    MEMORY,
    PRODUCTS,
    ROWS_APART,
    WINDOWS,
    all_levels,
    derived_planes,
    first_level,
    level_values,
    levels,
    window_bits,
)
from arbllm.format.bitplanes import pack

TERMS = (1, 2, 3, 4)
STATES = 1 << MEMORY


def bits_by_hand(first: Tensor, row: int, column: int) -> tuple[int, int]:
    """z1 and z0 of one weight, from first signs 0 or 1 (n, k)."""

    def above(distance: int) -> int:
        return int(first[row - distance, column]) if distance <= row else 0

    return above(0) ^ above(16) ^ above(40), above(24)


def random_signs(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(seed)).bool()


# Levels.


@pytest.mark.parametrize("terms", TERMS)
def test_levels_ascend_with_their_number(terms):
    values = level_values(terms)
    assert len(values) == 2 ** (terms + 1)
    assert all(low < high for low, high in itertools.pairwise(values))


@pytest.mark.parametrize("terms", TERMS)
def test_levels_come_in_pairs_of_opposite_signs(terms):
    values = level_values(terms)
    assert all(value == -other for value, other in zip(values, values[::-1], strict=True))
    assert all(len(places) % 2 for places in PRODUCTS[terms])


@pytest.mark.parametrize("terms", TERMS)
def test_a_level_is_the_sum_of_its_signs_and_products(terms):
    for number, value in enumerate(level_values(terms)):
        signs = [2 * (number >> terms - place & 1) - 1 for place in range(terms + 1)]
        expected = sum(COEFFICIENTS[terms][place] * sign for place, sign in enumerate(signs))
        for places, coefficient in PRODUCTS[terms].items():
            expected += coefficient * math.prod(signs[place] for place in places)
        assert value == pytest.approx(expected)


def test_levels_of_all_kinds_follow_each_other():
    together = all_levels()
    assert together.dtype == torch.float32
    assert together.shape == (60,)
    assert [first_level(terms) for terms in TERMS] == [0, 4, 12, 28]
    for terms in TERMS:
        own = together[first_level(terms) : first_level(terms) + 2 ** (terms + 1)]
        assert torch.equal(own, levels(terms))
        assert own.tolist() == pytest.approx(level_values(terms))


# Bits.


def test_the_bits_of_every_window():
    """Bit t of a window is the first sign t steps of ROWS_APART rows above."""
    assert (WINDOWS, MEMORY, ROWS_APART) == (64, 5, 8)
    for window in range(WINDOWS):
        first = torch.zeros(ROWS_APART * MEMORY + 1, 1, dtype=torch.uint8)
        for step in range(MEMORY + 1):
            first[ROWS_APART * (MEMORY - step)] = window >> step & 1
        last = slice(len(first) - 1, len(first))
        z1, z0 = (int(plane) for plane in derived_planes(first, last))
        assert (z1, z0) == bits_by_hand(first, len(first) - 1, 0)
        assert window_bits(window) == 2 * z1 + z0


def test_what_may_come_next_is_one_of_two_levels_a_quarter_of_all_apart():
    """The two values of the first sign lead to bits that differ in z1, which is what spaces the levels out.

    z0 follows from the state, so that neighbouring levels never compete; so too where two paths meet.
    """
    for window in range(0, WINDOWS, 2):
        minus, plus = window_bits(window), window_bits(window | 1)
        assert minus ^ plus == 2
        assert minus & 1 == plus & 1 == window >> 3 & 1
    for window in range(STATES):
        assert window_bits(window) ^ window_bits(window | STATES) == 2
    assert sorted(window_bits(window) for window in range(WINDOWS)) == sorted(4 * 4 * [0, 1, 2, 3])


def test_paths_that_part_are_as_far_apart_as_those_of_the_code_with_32_states():
    """Ungerboeck's table of 1982: a squared distance of 13 steps between levels, where single levels have 1."""
    squares = {0: 0, 1: 1, 2: 4, 3: 1}  # of the distance of levels whose last bits differ so
    least = dict.fromkeys(range(STATES), math.inf)
    least[1] = squares[window_bits(1)]  # away from the path of all -
    for _ in range(STATES):  # Bellman and Ford
        for state, sign in itertools.product(range(1, STATES), (0, 1)):
            window = state << 1 | sign
            following = window & (STATES - 1)
            least[following] = min(least[following], least[state] + squares[window_bits(window)])
    assert least[0] == 13


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 19),
    seed=st.integers(0, 10_000),
    bounds=st.tuples(st.integers(0, 70), st.integers(0, 70)),
)
def test_derived_bits_of_any_rows(rows, columns, seed, bounds):
    first = random_signs(rows, columns, seed)
    start, stop = sorted(min(bound, rows) for bound in bounds)
    z1, z0 = (torch.zeros(stop - start, columns, dtype=torch.bool) for _ in range(2))
    for row, column in itertools.product(range(start, stop), range(columns)):
        z1[row - start, column], z0[row - start, column] = bits_by_hand(first, row, column)
    by_byte = derived_planes(first.byte(), slice(start, stop))
    packed = derived_planes(pack(first), slice(start, stop))
    for expected, plane, bits in zip((z1, z0), by_byte, packed, strict=True):
        assert plane.dtype == bits.dtype == torch.uint8
        assert torch.equal(plane.bool(), expected)
        assert torch.equal(bits, pack(expected))
