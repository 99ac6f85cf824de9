import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbllm.binarize.binarize import binarize_block
from arbllm.binarize.joint import Levels, choose_levels, loss, refine_jointly, solve_columns, solve_rows
from arbllm.binarize.methods import get_method
from arbllm.config import PARTITIONS


def problem(seed: int, rows: int = 12, columns: int = 20, partition: str = "cgb", groups: int = 2):
    """A block of weights, its ARB-RC start, and a metric P."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(3 * columns, columns, generator=generator) * (0.2 + torch.rand(columns, generator=generator))
    metric = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(columns)
    start = binarize_block(
        weight, weight.square(), metric, get_method("arb-rc"), partition=partition, groups=groups, iterations=5
    )
    return weight, start.block, metric


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 2, 30]),
    columns=st.sampled_from([1, 5, 40]),
    partition=st.sampled_from(PARTITIONS),
    groups=st.sampled_from([2, 4]),
)
def test_every_step_lowers_the_loss_or_leaves_it(seed, rows, columns, partition, groups):
    weight, block, metric = problem(seed, rows, columns, partition, groups)
    levels = Levels.of(block)
    losses = [loss(weight, levels, metric)]
    for _ in range(3):
        basis = levels.basis()
        for step in (
            lambda now: solve_rows(weight, now, basis, metric),  # noqa: B023
            lambda now: solve_columns(weight, now, basis, metric),  # noqa: B023
            lambda now: choose_levels(weight, now, metric),
        ):
            levels = step(levels)
            losses.append(loss(weight, levels, metric))
    slack = 1e-4 * losses[0] + 1e-5
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0] or losses[0] < slack


def test_levels_are_the_block_they_were_made_from():
    for partition, groups in itertools.product(PARTITIONS, (2, 4)):
        _, block, _ = problem(1, partition=partition, groups=groups)
        levels = Levels.of(block)
        expected = torch.einsum("tnk,tn,tk->nk", levels.basis(), levels.rows, levels.columns)
        torch.testing.assert_close(expected, block.reconstruct())
        torch.testing.assert_close(levels.reconstruct(), block.reconstruct())


def test_rows_and_columns_are_least_squares_optima():
    """Nudging any scale after its step does not lower the loss."""
    weight, block, metric = problem(2, rows=40)
    levels = Levels.of(block)
    basis = levels.basis()
    rows = solve_rows(weight, levels, basis, metric)
    columns = solve_columns(weight, rows, basis, metric)
    for solved, name in ((rows, "rows"), (columns, "columns")):
        best = loss(weight, solved, metric)
        scales = getattr(solved, name)
        for term, direction in itertools.product(range(len(scales)), (-1, 1)):
            nudged = scales.clone()
            nudged[term] *= 1 + direction * 0.02
            changed = Levels(**{**solved.__dict__, name: nudged})
            assert loss(weight, changed, metric) >= best * (1 - 1e-4)


def test_a_single_column_gets_its_nearest_levels():
    weight, _, _ = problem(3)
    start = binarize_block(
        weight[:, :1], weight[:, :1].square(), torch.eye(1), get_method("arb-rc"), partition="group"
    ).block
    levels = choose_levels(weight[:, :1], Levels.of(start), torch.eye(1))
    reachable = torch.stack([s * levels.rows[g] * levels.columns[g, 0] for g in range(2) for s in (-1, 1)])
    nearest = (reachable - weight[:, 0]).abs().amin(0)
    torch.testing.assert_close((levels.reconstruct() - weight[:, :1]).abs()[:, 0], nearest)


def test_rounds_end_when_they_gain_little_and_the_history_tells():
    weight, block, metric = problem(4, rows=60, columns=64)
    refined, losses = refine_jointly(weight, block, metric, rounds=50)
    assert 2 < len(losses) < 20
    error = weight - refined.reconstruct()
    assert float(((error @ metric) * error).sum()) == pytest.approx(losses[-1], rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    for zone in (zone for part in refined.parts for zone in part.zones):
        for term in zone.terms:
            assert float(term.column_scales.abs().mean()) == pytest.approx(1, rel=1e-4)
