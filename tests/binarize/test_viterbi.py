import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arbllm.binarize import viterbi as module
from arbllm.binarize.code import MEMORY, ROWS_APART, derived_planes, levels, window_bits
from arbllm.binarize.sweep import TILE, Pass
from arbllm.binarize.viterbi import SIGN, best_path, viterbi_sweep
from arbllm.native import load

TERMS = (1, 2, 3, 4)
SHAPES = ((1, 1), (1, TILE + 8), (7, 5), (8, 33), (9, 5), (41, TILE + 8), (192, 1), (192, 5))  # rows, columns
built = pytest.mark.skipif(load() is None, reason="the native extension was not built")


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps are small: with more threads most time goes by waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def number_of(choices: Tensor) -> Tensor:
    return (choices & (SIGN - 1)).long()


def assert_code_words(choices: Tensor, terms: int) -> None:
    """The last two bits of every level follow from first signs; choices are uint8 (K, n)."""
    z1, z0 = derived_planes((choices >= SIGN).T.byte(), slice(0, choices.shape[1]))
    number = number_of(choices).T
    assert int(number.max()) < 2 ** (terms + 1)
    assert torch.equal(number & 3, (2 * z1 + z0).long())


def cost(wanted: Tensor, scales: Tensor, choices: Tensor, terms: int) -> Tensor:
    """Squared distance of the levels chosen from what is wanted, float64 (n)."""
    chosen = levels(terms).double()[number_of(choices)] * scales.double()
    return (wanted.double() - chosen).square()


def least_cost(wanted: Tensor, scales: Tensor, terms: int) -> float:
    """The least of all first signs of one sequence (n): each is tried."""
    signs = torch.tensor(list(itertools.product((0, 1), repeat=len(wanted)))).T
    now, two, three, five = (torch.cat([0 * signs[:steps], signs])[: len(signs)] for steps in (0, 2, 3, 5))
    bits = 2 * (now ^ two ^ five) + three
    least = by_bits(wanted, scales, terms)
    return float(sum(least[bits[row], row] for row in range(len(bits))).min())


def least_costs(wanted: Tensor, scales: Tensor, terms: int) -> Tensor:
    """The least of all first signs of each column of (K, n): what the cheapest path to each state costs, row by row."""
    padding = -wanted.shape[1] % ROWS_APART
    wanted, scales = (
        torch.nn.functional.pad(part, (0, padding)).unflatten(1, (-1, ROWS_APART)) for part in (wanted, scales)
    )
    states = torch.arange(2**MEMORY)
    windows = torch.stack([states, states + 2**MEMORY])  # by the oldest sign
    labels = torch.tensor([[window_bits(int(window)) for window in row] for row in windows])
    costs = torch.full((len(wanted), ROWS_APART, len(states)), torch.inf, dtype=torch.float64)
    costs[..., 0] = 0
    for step in range(wanted.shape[1]):
        least = by_bits(wanted[:, step], scales[:, step], terms).movedim(0, -1)
        costs = (costs[..., windows >> 1] + least[..., labels]).amin(-2)
    return costs.amin(-1).sum(1)


def by_bits(wanted: Tensor, scales: Tensor, terms: int) -> Tensor:
    """Squared distances of the nearest levels, by their last two bits: float64 (4, ...)."""
    table = levels(terms).double().view(-1, 4, *[1] * wanted.ndim)
    return (wanted.double() - table * scales.double()).square().amin(0)


def task(rows: int, columns: int, terms: int, with_values: bool) -> tuple[Tensor, Tensor, Pass]:
    """Row scales, column scales and what is wanted."""
    generator = torch.Generator().manual_seed(1000 * columns + 10 * rows + terms)
    row_scales = 0.5 + torch.rand(rows, generator=generator)
    column_scales = 0.5 + torch.rand(columns, generator=generator)
    state = torch.randn(columns, rows, generator=generator)
    values = torch.randn(columns, rows, generator=generator) if with_values else None
    steps = 0.5 + torch.rand(columns, generator=generator)
    influence = torch.randn(columns, columns, generator=generator) / columns**0.5
    return row_scales, column_scales, Pass(state, values, steps, influence)


def wanted_of(problem: Pass, found: Tensor) -> Tensor:
    """What each column was to be, given the values found for the columns before it: float64 (K, n)."""
    state, wanted = problem.state.double(), []
    for column, value in enumerate(found.double()):
        before = 0.0 if problem.values is None else problem.values[column].double()
        wanted.append(before + problem.steps[column].double() * state[column])
        change = value - (wanted[-1] if problem.values is None else before)
        state = state - problem.influence[:, column, None].double() * change
    return torch.stack(wanted)


# One column.


@settings(max_examples=60)
@given(rows=st.integers(1, 77), terms=st.sampled_from(TERMS), seed=st.integers(0, 10_000))
def test_no_other_signs_come_nearer(rows, terms, seed):
    generator = torch.Generator().manual_seed(seed)
    wanted = 1.5 * torch.randn(rows, generator=generator)
    scales = 0.2 + torch.rand(rows, generator=generator)
    choices = best_path(wanted, scales, levels(terms))
    assert choices.dtype == torch.uint8
    assert choices.shape == (rows,)
    assert_code_words(choices[None], terms)
    costs = cost(wanted, scales, choices, terms)
    for lane in range(min(ROWS_APART, rows)):
        own = slice(lane, None, ROWS_APART)
        least = least_cost(wanted[own].double(), scales[own].double(), terms)
        assert float(costs[own].sum()) == pytest.approx(least, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("terms", TERMS)
def test_a_code_word_is_found_again(terms):
    """What is wanted is a code word, disturbed by less than what tells it from others."""
    generator = torch.Generator().manual_seed(terms)
    first = torch.randint(2, (300, 1), generator=generator).byte()
    z1, z0 = derived_planes(first, slice(0, 300))
    free = torch.randint(2 ** (terms - 1), (300,), generator=generator)
    number = 4 * free + 2 * z1[:, 0] + z0[:, 0]
    scales = 0.5 + torch.rand(300, generator=generator)
    table = levels(terms)
    disturbed = table[number] + 0.3 * table.diff().min() * (torch.rand(300, generator=generator) - 0.5)
    choices = best_path(disturbed * scales, scales, table)
    assert torch.equal(number_of(choices), number)
    assert torch.equal(choices >= SIGN, first[:, 0].bool())


@pytest.mark.parametrize(("terms", "distortion"), [(1, 0.293), (2, 0.083), (3, 0.023), (4, 0.0065)])
def test_a_normal_distribution_is_represented_as_well_as_the_code_can(terms, distortion):
    """Where levels without a code leave 0.363, 0.117, 0.035 and 0.0095 of the variance."""
    weight = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(1))
    weight /= weight.square().mean().sqrt()
    one = torch.ones(1)
    _, values = viterbi_sweep(torch.ones(16_000), one, terms, Pass(weight, None, one, torch.zeros(1, 1)))
    assert float((weight - values).square().mean()) == pytest.approx(distortion, rel=0.03)


# Many columns.


def assert_best(rows: Tensor, columns: Tensor, terms: int, problem: Pass, found: tuple[Tensor, Tensor]) -> float:
    """Each column has its best signs given those before it; returns what all of them are off by."""
    choices, values = found
    assert_code_words(choices, terms)
    assert torch.equal(values, levels(terms)[number_of(choices)] * columns[:, None] * rows)
    wanted, scales = wanted_of(problem, values), columns[:, None] * rows
    costs = cost(wanted, scales, choices, terms).sum(1)
    torch.testing.assert_close(costs, least_costs(wanted, scales, terms), rtol=1e-5, atol=1e-8)
    return float(costs.sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("with_values", [False, True])
def test_each_column_gets_its_best_signs_given_those_before_it(with_values, terms, shape, monkeypatch):
    rows, columns, problem = task(shape[0], shape[1], terms, with_values)
    before = problem.state.clone()
    monkeypatch.setattr(module, "load", lambda: None)
    found = viterbi_sweep(rows, columns, terms, problem)
    expected = assert_best(rows, columns, terms, problem, found)
    assert torch.equal(problem.state, before)
    monkeypatch.undo()
    if load() is None:
        return
    native = viterbi_sweep(rows, columns, terms, problem)
    assert torch.equal(problem.state, before)
    assert torch.equal(native[0][0], found[0][0])
    # Sums are rounded in another order: a tie may fall the other way, and then all that follows differs.
    assert assert_best(rows, columns, terms, problem, native) == pytest.approx(expected, rel=0.01)


@built
def test_tensors_that_are_not_contiguous():
    rows, columns, problem = task(20, 9, 2, True)
    expected = viterbi_sweep(rows, columns, 2, problem)
    turned = Pass(*(part.T.contiguous().T if part is not None and part.ndim == 2 else part for part in problem))
    spread = torch.stack([rows, rows], 1)[:, 0]
    assert not spread.is_contiguous()
    found = viterbi_sweep(spread, columns, 2, turned)
    assert all(map(torch.equal, found, expected))


@built
@pytest.mark.parametrize("field", ["rows", "columns", "steps", "values", "influence"])
def test_shapes_that_do_not_agree_are_refused(field):
    rows, columns, problem = task(20, 9, 2, True)
    assert problem.values is not None
    spoiled = {
        "rows": (rows[1:], columns, problem),
        "columns": (rows, columns[1:], problem),
        "steps": (rows, columns, problem._replace(steps=problem.steps[1:])),
        "values": (rows, columns, problem._replace(values=problem.values[:, 1:])),
        "influence": (rows, columns, problem._replace(influence=problem.influence[:, 1:])),
    }
    sizes, factors, changed = spoiled[field]
    with pytest.raises(ValueError, match="shapes do not agree"):
        viterbi_sweep(sizes, factors, 2, changed)
