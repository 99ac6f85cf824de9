import pytest
import torch

from arbllm.budget import ERROR_PER_BIT, Demand, joint_layout
from arbllm.config import BinarizationConfig
from arbllm.format.accounting import total_size
from arbllm.model import sensitivity
from arbllm.model.capture import capture_inputs, gather_hessians
from arbllm.model.disturbance import group_linears
from arbllm.model.sensitivity import MOST_CORRECTION, measured_shares
from arbllm.model.walk import find_blocks
from tests.model.tiny_models import random_windows, tiny_model

CPU = torch.device("cpu")
CONFIG = BinarizationConfig(bits=2.6)


def shares_with(monkeypatch, divergence):
    """The shares where each group has the divergence a weight that `divergence(kind, depth)` gives."""

    def measured(_, groups, *__):
        sizes = {group: sum(linear.weight.numel() for linear in linears) for group, linears in groups.items()}
        return {group: size * divergence(*group) for group, size in sizes.items()}

    monkeypatch.setattr(sensitivity, "measure_divergences", measured)
    return measured_shares(tiny_model("llama"), random_windows(), CONFIG, CPU)


def mean(shares: dict[str, float], word: str) -> float:
    chosen = [share for name, share in shares.items() if word in name]
    return sum(chosen) / len(chosen)


def test_linears_whose_errors_do_more_than_foretold_get_more_bits(monkeypatch):
    even = shares_with(monkeypatch, lambda kind, depth: 1.0)
    values = shares_with(monkeypatch, lambda kind, depth: 3.0 if "v_proj" in kind else 1.0)
    last = shares_with(monkeypatch, lambda kind, depth: 3.0 if depth == 2 else 1.0)
    assert mean(values, "v_proj") > mean(even, "v_proj")
    assert mean(values, "up_proj") < mean(even, "up_proj")
    assert mean(last, "layers.2.") > mean(even, "layers.2.")
    assert mean(last, "layers.0.") < mean(even, "layers.0.")


def test_sums_over_groups_become_what_was_measured():
    model = tiny_model("llama")
    groups = group_linears(find_blocks(model))
    names = [linear.name for linears in groups.values() for linear in linears]
    demands = {name: Demand(8, 8, 1.0 + place) for place, name in enumerate(names)}
    shares = {name: 2.0 + 0.1 * (place % 5) for place, name in enumerate(names)}
    divergences = {group: 0.01 * (1 + place % 3) for place, group in enumerate(groups)}

    def foretold(demands):
        return {
            group: sum(demands[linear.name].worth * ERROR_PER_BIT ** -shares[linear.name] for linear in linears)
            for group, linears in groups.items()
        }

    after = foretold(sensitivity._corrected(demands, shares, groups, divergences))
    unit = sum(foretold(demands).values()) / sum(divergences.values())
    for group, wanted in divergences.items():
        ratio = unit * wanted / foretold(demands)[group]
        bounded = min(max(ratio, 1 / MOST_CORRECTION), MOST_CORRECTION)
        assert after[group] == pytest.approx(foretold(demands)[group] * bounded)


def test_a_model_without_any_divergence_keeps_its_shares(monkeypatch):
    """All factors are the same then, and a common factor changes nothing."""
    monkeypatch.setattr(sensitivity, "measure_divergences", lambda _, groups, *__: dict.fromkeys(groups, 0.0))
    model = tiny_model("llama")
    shares = measured_shares(model, random_windows(), CONFIG, CPU)
    assert all(1.1 <= share <= 4 for share in shares.values())


def test_errors_are_those_that_later_columns_make_up_for():
    """Under H, a probe's error costs its effort, the relative weight error before compensation being 1."""
    model, windows = tiny_model("llama"), random_windows(8, 64)
    blocks = find_blocks(model)
    probes = sensitivity._probe(model, blocks, windows, CPU)
    hidden, calls = capture_inputs(model, blocks, windows, CPU)
    for group in gather_hessians(blocks[0], calls[0], hidden):
        hessian = group.hessian + 0.01 * group.hessian.diagonal().mean() * torch.eye(len(group.hessian))
        for linear in group.linears:
            error, weight = probes[linear].error, linear.weight
            cost = float(((error @ hessian) * error).sum() / ((weight @ group.hessian) * weight).sum())
            assert cost == pytest.approx(probes[linear].effort, rel=0.6)
            assert error.dtype == weight.dtype


def test_the_budget_is_kept():
    model = tiny_model("llama")
    shares = measured_shares(model, random_windows(), CONFIG, CPU)
    linears = [linear for block in find_blocks(model) for linear in block.linears]
    assert list(shares) == [linear.name for linear in linears]
    layouts = []
    for linear in linears:
        rows, columns = linear.weight.shape
        layouts.append(joint_layout(rows, columns, shares[linear.name], CONFIG.scale_block))
    assert total_size(layouts).true_bits <= 2.6
