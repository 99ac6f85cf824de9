import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arbllm.binarize.joint import Levels, choose_levels, feed_forward, refit_scales, solve_columns, solve_rows, start
from arbllm.binarize.sweep import TILE
from arbllm.binarize.trellis import TrellisLevels

KINDS = list(itertools.product((1, 2, 4), (1, 2)))
WEIGHTS = ("random", "dead input", "constant", "zero", "one magnitude")


def loss(weight: Tensor, levels: Levels | TrellisLevels, metric: Tensor) -> float:
    """tr(E P E^T) with E = W - W_hat."""
    error = weight - levels.values()
    return float(((metric @ error) * error).sum())


def problem(seed: int, rows: int = 12, columns: int = 20, weights: str = "random") -> tuple[Tensor, Tensor]:
    """W^T (columns, rows) and a metric P."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, rows, generator=generator)
    inputs = torch.randn(3 * columns, columns, generator=generator) * (0.2 + torch.rand(columns, generator=generator))
    metric = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(columns)
    if weights == "dead input":
        weight[0] = metric[0] = metric[:, 0] = 0
        metric[0, 0] = 1
    if weights == "constant":
        weight = torch.full_like(weight, 0.7)
    if weights == "zero":
        weight = torch.zeros_like(weight)
    if weights == "one magnitude":  # groups that no weight uses, second terms that are not needed
        weight = 0.5 * weight.sign()
    return weight, metric


def upper_of(metric: Tensor) -> Tensor:
    """U, upper triangular, with P^-1 = U^T U."""
    lower = torch.linalg.cholesky(metric.double().flip(0, 1)).flip(0, 1)
    return torch.linalg.inv(lower).float()


def first_levels(weight: Tensor, metric: Tensor, groups: int, terms: int) -> Levels:
    return feed_forward(weight, start(weight, groups, terms), upper_of(metric))


def random_levels(seed: int, groups: int, terms: int, rows: int = 12, columns: int = 20) -> Levels:
    """Any choices, and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def scales(length: int) -> Tensor:
        values = 0.1 + torch.rand(groups * terms, length, generator=generator)
        return values * (1 - 2 * torch.randint(2, values.shape, generator=generator))

    choices = torch.randint(groups * 2**terms, (columns, rows), generator=generator).byte()
    return Levels(groups, terms, choices, scales(rows), scales(columns))


def energy(weight: Tensor, metric: Tensor) -> float:
    return float(((metric @ weight) * weight).sum())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 2, 30]),
    columns=st.sampled_from([1, 5, TILE + 8]),
    groups=st.sampled_from([1, 2, 4]),
    terms=st.sampled_from([1, 2]),
    weights=st.sampled_from(WEIGHTS),
)
def test_every_step_lowers_the_loss_or_leaves_it(seed, rows, columns, groups, terms, weights):
    weight, metric = problem(seed, rows, columns, weights)
    levels = first_levels(weight, metric, groups, terms)
    losses = [loss(weight, levels, metric)]
    for _ in range(3):
        basis = levels.basis()
        for step in (
            lambda now: solve_rows(metric @ weight, now, basis, metric),  # noqa: B023
            lambda now: solve_columns(metric @ weight, now, basis, metric),  # noqa: B023
            lambda now: choose_levels(metric @ weight, now, metric),
        ):
            levels = step(levels)
            losses.append(loss(weight, levels, metric))
    slack = 1e-6 * energy(weight, metric)
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize(("groups", "terms"), KINDS)
def test_values_table_and_basis_agree(groups, terms):
    levels = random_levels(1, groups, terms)
    expected = torch.einsum("skn,sn,sk->kn", levels.basis(), levels.rows, levels.columns)
    torch.testing.assert_close(levels.values(), expected)
    assert levels.table().shape == (groups * 2**terms, 20, 12)
    # Levels come in pairs of opposite signs.
    by_group = levels.table().unflatten(0, (groups, 2**terms))
    torch.testing.assert_close(by_group, -by_group.flip(1))


@pytest.mark.parametrize(("groups", "terms"), KINDS)
def test_a_part_reconstructs_the_values(groups, terms):
    levels = random_levels(2, groups, terms)
    columns = torch.arange(20) * 3
    part = levels.to_part(columns)
    torch.testing.assert_close(part.reconstruct(), levels.values().T)
    assert part.columns is columns
    assert (len(part.zones), len(part.zones[0].terms)) == (groups, terms)
    assert torch.equal(sum(zone.mask.long() for zone in part.zones), torch.ones(12, 20, dtype=torch.int64))


def test_columns_in_another_order():
    levels, order = random_levels(3, 4, 2), torch.randperm(20)
    assert torch.equal(levels.reordered(order).values(), levels.values()[order])


# Start.


@pytest.mark.parametrize(
    ("groups", "terms", "distortion"),
    [(1, 1, 0.3634), (2, 1, 0.1175), (1, 2, 0.1175), (4, 1, 0.03454), (2, 2, 0.03454), (4, 2, 0.009497)],
)
def test_the_start_suits_a_normal_distribution(groups, terms, distortion):
    """Distortions from Max's table of optimum quantizers with 2, 4, 8 and 16 levels; any scales of rows and columns."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 2000, generator=generator) * torch.rand(2000, generator=generator)
    weight *= 0.5 + torch.rand(64, 1, generator=generator)
    levels = choose_levels(weight, start(weight, groups, terms), torch.eye(64))
    error = (weight - levels.values()).square().sum() / weight.square().sum()
    assert float(error) == pytest.approx(distortion, rel=0.05)


# Scales.


def row_systems(weight: Tensor, levels: Levels, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares for the row scales of each row: matrices (n, K, slots) and right sides (n, K, 1), float64."""
    root = torch.linalg.cholesky(metric.double()).T
    terms = (levels.basis() * levels.columns[:, :, None]).double()
    return root @ terms.permute(2, 1, 0), (root @ weight.double()).T[..., None]


def column_system(weight: Tensor, levels: Levels, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares for all column scales: a matrix (n K, slots K) and the right side (n K, 1), float64."""
    root = torch.linalg.cholesky(metric.double()).T
    vectors = (levels.basis() * levels.rows[:, None, :]).double()
    matrix = torch.einsum("kj,sjn->nksj", root, vectors).flatten(2).flatten(0, 1)
    return matrix, (root @ weight.double()).T.flatten()[:, None]


def least_loss(matrix: Tensor, target: Tensor) -> float:
    """What the pseudoinverse leaves, whatever the rank."""
    return float((target - matrix @ (torch.linalg.pinv(matrix) @ target)).square().sum())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("groups", "terms"), KINDS)
@pytest.mark.parametrize("shape", [(1, 7), (3, 5), (40, 9)])
def test_scales_reach_the_least_squares_optimum(shape, groups, terms, weights):
    weight, metric = problem(5, rows=shape[0], columns=shape[1], weights=weights)
    levels = first_levels(weight, metric, groups, terms)
    allowed = 1e-4 * energy(weight, metric)
    rows = solve_rows(metric @ weight, levels, levels.basis(), metric)
    assert loss(weight, rows, metric) <= least_loss(*row_systems(weight, levels, metric)) + allowed
    columns = solve_columns(metric @ weight, rows, None, metric)
    assert loss(weight, columns, metric) <= least_loss(*column_system(weight, rows, metric)) + allowed


def test_well_posed_scales_are_those_of_lstsq():
    weight, metric = problem(6, rows=60, columns=16)
    levels = first_levels(weight, metric, 2, 1)
    rows = solve_rows(metric @ weight, levels, levels.basis(), metric)
    expected = torch.linalg.lstsq(*row_systems(weight, levels, metric)).solution[..., 0].T
    torch.testing.assert_close(rows.rows, expected.float(), rtol=1e-3, atol=1e-3)
    columns = solve_columns(metric @ weight, rows, None, metric)
    expected = torch.linalg.lstsq(*column_system(weight, rows, metric)).solution.view(2, 16)
    torch.testing.assert_close(columns.columns, expected.float(), rtol=1e-3, atol=1e-3)


def test_slots_that_no_weight_uses_keep_their_scales():
    weight, metric = problem(7)
    levels = random_levels(7, 4, 2)
    levels = Levels(4, 2, levels.choices % 8, levels.rows, levels.columns)  # groups 0 and 1 alone
    basis = levels.basis()
    rows = solve_rows(metric @ weight, levels, basis, metric)
    columns = solve_columns(metric @ weight, levels, basis, metric)
    torch.testing.assert_close(rows.rows[4:], levels.rows[4:])
    torch.testing.assert_close(columns.columns[4:], levels.columns[4:])
    assert not torch.equal(rows.rows[:4], levels.rows[:4])


# Rounding.


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    groups=st.sampled_from([1, 2, 4]),
    terms=st.sampled_from([1, 2]),
    size=st.sampled_from([1, 7]),
)
def test_rounded_scales_are_positive_and_change_no_sign(seed, groups, terms, size):
    levels = random_levels(seed, groups, terms, rows=size, columns=size)
    rounded = levels.rounded()
    assert (rounded.rows > 0).all()
    assert (rounded.columns > 0).all()
    # 1.5 % for a row scale and for a column scale, of the sizes of a weight's terms: two of them may cancel.
    terms_of = torch.einsum("skn,sn,sk->skn", levels.basis(), levels.rows, levels.columns)
    error = (rounded.values() - levels.values()).abs()
    assert (error <= 0.03 * terms_of.abs().sum(0)).all()
    after = torch.einsum("skn,sn,sk->skn", rounded.basis(), rounded.rows, rounded.columns)
    assert torch.equal(after.sign(), terms_of.sign())


def test_what_is_rounded_stays():
    levels = random_levels(8, 4, 2).rounded()
    again = levels.rounded()
    assert torch.equal(again.choices, levels.choices)
    torch.testing.assert_close(again.rows, levels.rows, rtol=0, atol=0)
    torch.testing.assert_close(again.columns, levels.columns, rtol=0, atol=0)


def test_refitted_scales_are_stored_ones_and_better():
    weight, metric = problem(9, rows=60, columns=40)
    levels = first_levels(weight, metric, 2, 2)
    refitted = refit_scales(metric @ weight, levels, metric)
    assert torch.equal(refitted.rounded().values(), refitted.values())
    assert loss(weight, refitted, metric) < loss(weight, levels, metric)


# Levels.


def naive_feed_forward(weight: Tensor, levels: Levels, upper: Tensor) -> Tensor:
    """The same column by column in float64: the nearest of all levels, its error times U_j,: / U_jj taken off."""
    remaining, table = weight.double().clone(), levels.table().double()
    values = torch.empty_like(remaining)
    for j in range(len(weight)):
        nearest = (table[:, j] - remaining[j]).abs().argmin(0)
        values[j] = table[:, j].gather(0, nearest[None])[0]
        remaining[j + 1 :] -= (upper[j, j + 1 :] / upper[j, j]).double()[:, None] * (remaining[j] - values[j])
    return values.float()


def naive_sweep(weight: Tensor, levels: Levels, metric: Tensor) -> Tensor:
    """The same weight by weight in float64: of all levels the one with the least loss."""
    values, table, exact = levels.values().double(), levels.table().double(), metric.double()
    for j, i in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        errors = (weight[:, i].double() - values[:, i]).repeat(len(table), 1)
        errors[:, j] = weight[j, i].double() - table[:, j, i]
        values[j, i] = table[((errors @ exact) * errors).sum(1).argmin(), j, i]
    return values.float()


@pytest.mark.parametrize(("groups", "terms"), KINDS)
@pytest.mark.parametrize("columns", [1, 9, TILE + 8])
def test_feed_forward_is_what_its_description_says(groups, terms, columns):
    weight, metric = problem(10, rows=8, columns=columns)
    upper = upper_of(metric)
    levels = random_levels(10, groups, terms, 8, columns)
    expected = naive_feed_forward(weight, levels, upper)
    torch.testing.assert_close(feed_forward(weight, levels, upper).values(), expected)


@pytest.mark.parametrize(("groups", "terms"), KINDS)
@pytest.mark.parametrize("columns", [1, 9, TILE + 8])
def test_a_sweep_takes_each_weight_to_its_best_level(groups, terms, columns):
    weight, metric = problem(11, rows=4, columns=columns)
    levels = random_levels(11, groups, terms, 4, columns)
    torch.testing.assert_close(
        choose_levels(metric @ weight, levels, metric).values(), naive_sweep(weight, levels, metric)
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), groups=st.sampled_from([1, 2, 4]), terms=st.sampled_from([1, 2]))
def test_a_single_column_gets_its_nearest_levels(seed, groups, terms):
    weight, metric = problem(seed, columns=1)
    levels = random_levels(seed, groups, terms, columns=1)
    nearest = (levels.table()[:, 0] - weight[0]).abs().amin(0)
    for chosen in (choose_levels(metric @ weight, levels, metric), feed_forward(weight, levels, upper_of(metric))):
        torch.testing.assert_close((chosen.values() - weight).abs()[0], nearest)


def test_one_column_after_the_other_is_better_than_each_by_itself():
    weight, metric = problem(12, rows=40, columns=64)
    upper, levels = upper_of(metric), start(weight, 2, 1)
    alone = choose_levels(weight, levels, torch.eye(64))
    assert loss(weight, feed_forward(weight, levels, upper), metric) < 0.9 * loss(weight, alone, metric)
