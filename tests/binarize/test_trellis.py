import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arbllm.binarize import joint
from arbllm.binarize.code import derived_planes
from arbllm.binarize.sweep import TILE
from arbllm.binarize.trellis import TrellisLevels, choose_levels, feed_forward, refit_scales, start
from arbllm.binarize.viterbi import SIGN
from arbllm.format.assemble import assemble
from arbllm.format.layout import Segment
from tests.binarize.test_joint import WEIGHTS, energy, loss, problem, upper_of
from tests.binarize.test_viterbi import least_costs
from tests.helpers import levels_by_hand, trellis_values

TERMS = (1, 2, 3, 4)


def first_levels(weight: Tensor, metric: Tensor, terms: int) -> TrellisLevels:
    return feed_forward(weight, start(weight, terms), upper_of(metric))


def random_levels(seed: int, terms: int, rows: int = 50, columns: int = 20) -> TrellisLevels:
    """Any code words, and any scales."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(2, (rows, columns), generator=generator).byte()
    free = torch.randint(2 ** (terms - 1), (rows, columns), generator=generator).byte()
    z1, z0 = derived_planes(first, slice(0, rows))
    choices = (SIGN * first + 4 * free + 2 * z1 + z0).T.contiguous()
    scales = (0.1 + torch.rand(length, generator=generator) for length in (rows, columns))
    return TrellisLevels(terms, choices, *scales)


def rounding(levels: TrellisLevels, metric: Tensor) -> float:
    """What the rounding of row scales and then of column scales, 1.5 % each, can add to the least loss."""
    return 2 * 0.016**2 * float(torch.linalg.eigvalsh(metric).max() * levels.values().square().sum())


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 2, 30]),
    columns=st.sampled_from([1, 5, TILE + 8]),
    terms=st.sampled_from(TERMS),
    weights=st.sampled_from(WEIGHTS),
)
def test_every_step_lowers_the_loss_or_leaves_it(seed, rows, columns, terms, weights):
    """Up to what rounded scales add; with few rows, where a scale may have to stay as it is, choices alone."""
    weight, metric = problem(seed, rows, columns, weights)
    goal, slack = metric @ weight, 1e-6 * energy(weight, metric)
    levels = first_levels(weight, metric, terms)
    for _ in range(3):
        before = loss(weight, levels, metric)
        levels = refit_scales(goal, levels, metric)
        assert torch.isfinite(levels.values()).all()
        after = loss(weight, levels, metric)
        assert after <= before + rounding(levels, metric) + slack
        levels = choose_levels(goal, levels, metric)
        assert loss(weight, levels, metric) <= after + slack


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), terms=st.sampled_from(TERMS), columns=st.sampled_from([1, 7]))
def test_choices_lower_the_loss_from_anywhere(seed, terms, columns):
    weight, metric = problem(seed, 12, columns)
    levels = random_levels(seed, terms, 12, columns)
    losses = [loss(weight, levels, metric)]
    for _ in range(3):
        levels = choose_levels(metric @ weight, levels, metric)
        losses.append(loss(weight, levels, metric))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("terms", TERMS)
def test_the_start_suits_a_normal_distribution(terms):
    """With any scales of columns, and better than levels without a code at the same bits."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 2000, generator=generator) * (0.5 + torch.rand(64, 1, generator=generator))
    levels = choose_levels(weight, start(weight, terms), torch.eye(64))
    error = (weight - levels.values()).square().sum() / weight.square().sum()
    assert float(error) == pytest.approx({1: 0.293, 2: 0.083, 3: 0.023, 4: 0.0065}[terms], rel=0.05)
    plain = joint.start(weight, *{1: (1, 1), 2: (2, 1), 3: (2, 2), 4: (4, 2)}[terms])
    alone = joint.choose_levels(weight, plain, torch.eye(64))
    assert error < 0.85 * (weight - alone.values()).square().sum() / weight.square().sum()


# As it is stored.


@pytest.mark.parametrize("terms", TERMS)
def test_a_part_has_the_signs_that_the_values_follow_from(terms):
    levels = random_levels(2, terms)
    columns = torch.arange(20) * 3
    part = levels.to_part(columns)
    assert part.columns is columns
    assert part.kind == (1, terms, True)
    assert all(sign.shape == (50, 20) and sign.dtype == torch.bool for sign in part.stored)
    assert all(torch.equal(part.signs(term), part.stored[term]) for term in range(terms))
    assert torch.equal(part.stored[0], (levels.choices >= SIGN).T)
    torch.testing.assert_close(levels_by_hand(part.stored), levels.shapes().T)
    torch.testing.assert_close(trellis_values(part), levels.values().T)
    assert part.row_means == []
    assert len(part.scales) == 1
    assert part.group_numbers.shape == (50, 20)
    assert not part.group_numbers.any()


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    terms=st.lists(st.sampled_from(TERMS), min_size=1, max_size=3),
    rows=st.sampled_from([1, 9, 41, 60]),
    plain=st.booleans(),
)
def test_packed_parts_dequantize_to_the_values(seed, terms, rows, plain):
    generator = torch.Generator().manual_seed(seed)
    solved: list[TrellisLevels | joint.Levels] = [
        random_levels(seed + place, kind, rows, 5 + 4 * place).rounded() for place, kind in enumerate(terms)
    ]
    if plain:
        weight = torch.randn(6, rows, generator=generator)
        solved.insert(0, joint.choose_levels(weight, joint.start(weight, 2, 2).rounded(), torch.eye(6)))
    widths = [len(levels.values()) for levels in solved]
    order = torch.randperm(sum(widths), generator=generator)
    expected, parts = torch.empty(rows, sum(widths)), []
    for levels, columns in zip(solved, order.split(widths), strict=True):
        expected[:, columns] = levels.values().T
        parts.append(levels.to_part(columns))
    matrix = assemble(parts, scale_bits=8)
    torch.testing.assert_close(matrix.dequantize(), expected, rtol=1e-6, atol=1e-7)
    kinds = ([(2, 2, False)] if plain else []) + [(1, kind, True) for kind in terms]
    assert matrix.layout.segments == tuple(Segment(width, *kind) for width, kind in zip(widths, kinds, strict=True))


def test_columns_in_another_order():
    levels, order = random_levels(3, 3), torch.randperm(20)
    assert torch.equal(levels.reordered(order).values(), levels.values()[order])


# Scales.


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", [(1, 7), (3, 5), (40, 9)])
def test_scales_reach_the_least_squares_optimum(shape, terms, weights, monkeypatch):
    weight, metric = problem(5, rows=shape[0], columns=shape[1], weights=weights)
    monkeypatch.setattr(TrellisLevels, "rounded", lambda levels: levels)
    levels = first_levels(weight, metric, terms)
    refitted = refit_scales(metric @ weight, levels, metric)
    root, shapes = torch.linalg.cholesky(metric.double()).T, levels.shapes().double()
    # Each row by itself.
    for row in range(shape[0]):
        vector = root @ (shapes[:, row] * levels.columns)
        best = vector @ (root @ weight[:, row].double()) / vector.square().sum()
        if best > 0:
            assert float(refitted.rows[row]) == pytest.approx(float(best), rel=1e-3, abs=1e-30)
        else:
            assert refitted.rows[row] == levels.rows[row]
    # All columns together.
    target = root @ weight.double()
    system = (root[:, None, :] * (shapes * refitted.rows).T[None]).flatten(0, 1)
    best = torch.linalg.pinv(system) @ target.flatten()
    if (best > 0).all():
        least = float((target.flatten() - system @ best).square().sum())
        assert loss(weight, refitted, metric) <= least + 1e-4 * energy(weight, metric)


def test_refitted_scales_are_stored_ones_and_better():
    weight, metric = problem(9, rows=60, columns=40)
    for terms in TERMS:
        levels = first_levels(weight, metric, terms)
        refitted = refit_scales(metric @ weight, levels, metric)
        assert torch.equal(refitted.choices, levels.choices)
        assert torch.equal(refitted.rounded().values(), refitted.values())
        assert loss(weight, refitted, metric) < loss(weight, levels, metric)


def test_a_scale_that_would_not_be_positive_stays():
    weight, metric = problem(10, columns=1)
    levels = first_levels(weight, metric, 2).rounded()
    turned = refit_scales(-(metric @ weight), levels, metric)
    assert torch.equal(turned.rows, levels.rows)
    assert torch.equal(turned.columns, levels.columns)


def test_column_scales_that_would_be_negative_do_not_raise_the_loss(monkeypatch):
    weight, metric = problem(118, rows=1, columns=5, weights="constant")
    monkeypatch.setattr(TrellisLevels, "rounded", lambda levels: levels)
    levels = first_levels(weight, metric, 1)
    refitted = refit_scales(metric @ weight, levels, metric)
    assert loss(weight, refitted, metric) < loss(weight, levels, metric)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), terms=st.sampled_from(TERMS), size=st.sampled_from([1, 7]))
def test_rounded_scales_are_positive_and_near(seed, terms, size):
    levels = random_levels(seed, terms, size, size)
    rounded = levels.rounded()
    assert (rounded.rows > 0).all()
    assert (rounded.columns > 0).all()
    assert torch.equal(rounded.choices, levels.choices)
    # 1.5 % for a row scale and for a column scale.
    assert ((rounded.values() - levels.values()).abs() <= 0.031 * levels.values().abs()).all()
    again = rounded.rounded()
    assert torch.equal(again.rows, rounded.rows)
    assert torch.equal(again.columns, rounded.columns)


@pytest.mark.parametrize("terms", TERMS)
def test_rows_and_columns_of_zeros(terms):
    weight, metric = problem(11, rows=30, columns=12)
    weight[3] = weight[:, 5] = 0
    levels = first_levels(weight, metric, terms).rounded()
    for _ in range(2):
        levels = choose_levels(metric @ weight, refit_scales(metric @ weight, levels, metric), metric)
        values = levels.values()
        assert torch.isfinite(values).all()
        assert not values[:, 5].any()
        assert loss(weight, levels, metric) < 0.6 * energy(weight, metric)
    silent = first_levels(torch.zeros_like(weight), metric, terms)
    silent = refit_scales(torch.zeros_like(weight), silent, metric)
    assert not choose_levels(torch.zeros_like(weight), silent, metric).values().any()
    matrix = assemble([silent.rounded().to_part(torch.arange(12))], scale_bits=8)
    assert not matrix.dequantize().any()


# One column after the other.


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("columns", [1, 9, TILE + 8])
def test_feed_forward_is_what_its_description_says(terms, columns):
    """Column after column, the error of each times U_j,: / U_jj taken off the later ones; in float64."""
    weight, metric = problem(10, rows=19, columns=columns)
    upper = upper_of(metric)
    scaled = random_levels(10, terms, 19, columns)
    found, remaining = feed_forward(weight, scaled, upper), weight.double().clone()
    values = found.values().double()
    for j in range(columns):
        scales = (scaled.rows * scaled.columns[j]).double()
        least = float(least_costs(remaining[j][None], scales[None], terms))
        assert float((remaining[j] - values[j]).square().sum()) == pytest.approx(least, rel=1e-4, abs=1e-9)
        remaining[j + 1 :] -= (upper[j, j + 1 :] / upper[j, j]).double()[:, None] * (remaining[j] - values[j])
    assert torch.equal(found.rows, scaled.rows)
    assert torch.equal(found.columns, scaled.columns)


@pytest.mark.parametrize("terms", TERMS)
def test_a_sweep_takes_each_column_to_its_best_signs(terms):
    """Of a metric in which columns disturb each other: no other code word of a column is better."""
    weight, metric = problem(11, rows=30, columns=6)
    levels = choose_levels(metric @ weight, random_levels(11, terms, 30, 6), metric)
    found = loss(weight, levels, metric)
    for other in random_levels(12, terms, 30, 50).choices:
        choices = levels.choices.clone()
        choices[-1] = other  # the last column alone saw all the others as they are now
        assert loss(weight, replace(levels, choices=choices), metric) >= found * (1 - 1e-6)


def test_one_column_after_the_other_is_better_than_each_by_itself():
    weight, metric = problem(12, rows=40, columns=64)
    upper, levels = upper_of(metric), start(weight, 2)
    alone = choose_levels(weight, levels, torch.eye(64))
    assert loss(weight, feed_forward(weight, levels, upper), metric) < 0.9 * loss(weight, alone, metric)
