import itertools
import json

import pytest
import torch

from arbllm.baselines import SHRINKS, fit_grid, gptq, round_to_nearest, true_bits
from arbllm.difference import output_error
from arbllm.errors import ConfigError, ModelError
from arbllm.factor import factorize
from tests.data import needs


def problem(rows: int = 12, columns: int = 20, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(10 * columns, columns, generator=generator) @ mixing
    return weight, 0.2 / columns * inputs.T @ inputs


def nearest_by_hand(value: float, low: float, high: float, bits: int) -> float:
    """The nearest value of the grid from low to high, every value tried."""
    scale = torch.tensor((high - low) / (2**bits - 1)).half().item()
    zero = round(-low / scale)
    return min((scale * (code - zero) for code in range(2**bits)), key=lambda level: abs(level - value))


@pytest.mark.parametrize("bits", [2, 3])
def test_clipping_finds_the_best_of_all_shrunk_grids(bits):
    values = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    rounded = fit_grid(values, bits, clip=True).nearest(values)
    for row in range(3):
        weights = values[:, row].tolist()
        low, high = min(0.0, *weights), max(0.0, *weights)
        least = min(
            sum((nearest_by_hand(w, low * s / 100, high * s / 100, bits) - w) ** 2 for w in weights) for s in SHRINKS
        )
        assert (rounded[:, row] - values[:, row]).square().sum().item() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("group_size", [20, 8, 1])
def test_gptq_is_optimal_brain_surgery_with_rounding(group_size):
    """The later columns move to where the error is least, given all columns rounded so far: solved from scratch."""
    weight, hessian = problem()
    rounded = gptq(weight, hessian, 3, group_size=group_size, clip=False).weight
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20)).double()
    expected, present = weight.double(), weight.double()
    for column in range(20):
        if column % group_size == 0:
            grid = fit_grid(present[:, column : column + group_size].T.float(), 3, clip=False)
        expected[:, column] = grid.nearest(present[:, column].float())
        done, later = slice(0, column + 1), slice(column + 1, 20)
        gap = weight.double()[:, done] - expected[:, done]
        pull = torch.linalg.solve(damped[later, later], damped[later, done] @ gap.T).T
        present[:, later] = weight.double()[:, later] + pull
    assert torch.allclose(rounded, expected.float(), atol=1e-5)


def test_no_codes_are_better_than_all_codes_tried():
    weight, hessian = problem(rows=1, columns=4)
    grid = fit_grid(weight.T, 2, clip=False)
    levels = [(grid.scales * (code - grid.zeros)).item() for code in range(4)]
    errors = [output_error(weight, torch.tensor([point]), hessian) for point in itertools.product(levels, repeat=4)]
    found = output_error(weight, gptq(weight, hessian, 2, clip=False).weight, hessian)
    assert min(errors) - 1e-7 <= found <= sorted(errors)[len(errors) // 20]


def test_gptq_on_the_reference_matrices():
    from safetensors.torch import load_file

    folder = needs("reference")
    tensors = load_file(folder / "reference.safetensors")
    for name in json.loads((folder / "reference.json").read_text()):
        weight, hessian = tensors[f"{name}.weight"], tensors[f"{name}.hessian"]
        most = {"q": (0.047, 0.0095), "k": (0.032, 0.0068), "d": (0.082, 0.0204)}[name.split(".")[-1][0]]
        for bits, limit in zip((2, 3), most, strict=True):
            factor = factorize(hessian)
            error = output_error(weight, gptq(weight, hessian, bits, factor=factor).weight, hessian)
            assert error <= limit, name
            for clip in (True, False):
                assert error < output_error(weight, round_to_nearest(weight, bits, clip=clip).weight, hessian), name
            assert output_error(weight, gptq(weight, hessian, bits, by_energy=True).weight, hessian) < error, name


def test_bits_counted_by_hand():
    # 3 rows of 300 columns: three grids a row, of a float16 scale and a zero; the order is 300 numbers of 16 bits.
    assert true_bits(3, 300, 4, 128) == pytest.approx((3 * 300 * 4 + 3 * 3 * (16 + 4)) / 900)
    assert true_bits(3, 300, 4, 128, ordered=True) == pytest.approx((3 * 300 * 4 + 3 * 3 * (16 + 4) + 300 * 16) / 900)
    assert true_bits(64, 128, 2, 128) == 2 + 18 / 128
    assert true_bits(1, 2**15, 2, 2**15, ordered=True) == pytest.approx(2 + 18 / 2**15 + 32)
    weight, hessian = problem()
    assert round_to_nearest(weight, 8, group_size=16).true_bits == 8 + 2 * 24 / 20
    assert gptq(weight, hessian, 8, group_size=16).true_bits == 8 + 2 * 24 / 20
    assert gptq(weight, hessian, 8, group_size=16, by_energy=True).true_bits == 8 + (12 * 2 * 24 + 20 * 16) / 240


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [True, False])
def test_what_comes_out_fits_what_is_counted(bits, clip):
    weight, hessian = problem(columns=16)
    rounded = round_to_nearest(weight, bits, group_size=8, clip=clip).weight
    for part, group in zip(weight.split(8, dim=1), rounded.split(8, dim=1), strict=True):
        grid = fit_grid(part.T, bits, clip)
        assert torch.equal(grid.scales, grid.scales.half().float())
        assert torch.equal(grid.zeros, grid.zeros.round().clamp(0, 2**bits - 1))
        codes = (group.T / grid.scales).round() + grid.zeros
        assert codes.min() >= 0
        assert codes.max() <= 2**bits - 1
        assert torch.equal((codes - grid.zeros) * grid.scales, group.T)
    compensated = gptq(weight, hessian, bits, group_size=8, clip=clip).weight
    assert compensated.dtype == rounded.dtype == torch.float32
    assert all(len(row.unique()) <= 2**bits for group in compensated.split(8, dim=1) for row in group)


def test_more_bits_leave_less_error():
    weight, hessian = problem(rows=30, columns=60)
    for rounding in (lambda bits: round_to_nearest(weight, bits), lambda bits: gptq(weight, hessian, bits)):
        errors = [output_error(weight, rounding(bits).weight, hessian) for bits in (2, 3, 4, 8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-4


def test_clipping_never_raises_the_squared_error():
    weight, _ = problem()
    spans, clipped = (round_to_nearest(weight, 2, group_size=8, clip=clip).weight for clip in (False, True))
    assert ((clipped - weight).square().sum(1) <= (spans - weight).square().sum(1)).all()


def test_without_correlation_gptq_rounds_to_nearest():
    weight, _ = problem()
    hessian = torch.diag(torch.linspace(2.0, 1.0, 20))
    rounded = round_to_nearest(weight, 3, group_size=8)
    assert torch.equal(gptq(weight, hessian, 3, group_size=8).weight, rounded.weight)
    assert torch.equal(gptq(weight, hessian, 3, group_size=8, by_energy=True).weight, rounded.weight)


def test_the_order_by_energy_is_that_of_sorted_columns():
    weight, hessian = problem()
    order = hessian.diagonal().argsort(descending=True)
    by_hand = gptq(weight[:, order], hessian[order][:, order], 3, group_size=8).weight
    assert torch.allclose(gptq(weight, hessian, 3, group_size=8, by_energy=True).weight[:, order], by_hand)


def test_zeros_stay_zeros_and_inputs_are_left_alone():
    weight, hessian = problem()
    weight[3] = 0
    hessian[:, 5] = hessian[5] = 0
    copies = weight.clone(), hessian.clone()
    rounded = gptq(weight.bfloat16(), hessian, 2, group_size=8).weight
    assert not rounded[3].any()
    assert not rounded[:, 5].any()
    gptq(weight, hessian, 2)
    round_to_nearest(weight, 2)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    assert not round_to_nearest(torch.zeros(2, 3), 2).weight.any()


def test_errors_say_what_is_wrong():
    weight, hessian = problem()
    for bits in (1, 5, 16, -2):
        with pytest.raises(ConfigError, match=f"bits must be one of 2, 3, 4, 8, not {bits}"):
            gptq(weight, hessian, bits)
        with pytest.raises(ConfigError, match="bits must be"):
            round_to_nearest(weight, bits)
    with pytest.raises(ConfigError, match="group_size must be a whole number of at least 1, not 0"):
        round_to_nearest(weight, 2, group_size=0)
    with pytest.raises(ConfigError, match=r"needs a Hessian \(m, m\), not \[12, 20\] and \[12, 12\]"):
        gptq(weight, torch.eye(12), 2)
    with pytest.raises(ConfigError, match=r"must have the shape \(n, m\), not \[20\]"):
        round_to_nearest(weight[0], 2)
    with pytest.raises(ModelError, match="NaN or infinite"):
        round_to_nearest(torch.tensor([[1.0, float("nan")]]), 2)
    with pytest.raises(ModelError, match="beyond float16"):
        round_to_nearest(torch.tensor([[1.0, 1e6]]), 2)
