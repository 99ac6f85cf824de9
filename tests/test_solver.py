import itertools
import json
import warnings

import pytest
import torch

import arbllm
from arbllm.config import PARTITIONS, BinarizationConfig
from arbllm.errors import ConfigError, ModelError
from arbllm.factor import factorize
from arbllm.solver import quantize_matrix
from tests.data import needs

REFERENCE_CASES = {
    "braq": ("billm", "column+group"),
    "arb": ("arb", "column+group"),
    "arb+cgb": ("arb", "cgb"),
    "arb-x+cgb": ("arb-x", "cgb"),
    "arb-rc": ("arb-rc", "column+group"),
    "arb-rc+cgb": ("arb-rc", "cgb"),
}


def problem(rows: int = 24, columns: int = 40, tokens: int = 200, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return weight, 2 / tokens * inputs.T @ inputs


def reference_matrices():
    from safetensors.torch import load_file

    folder = needs("reference")
    figures = json.loads((folder / "reference.json").read_text())
    tensors = load_file(folder / "reference.safetensors")
    return [(name, tensors[f"{name}.weight"], tensors[f"{name}.hessian"], figures[name]) for name in figures]


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_faithful_mode_reaches_the_reference_implementation(case):
    method, partition = REFERENCE_CASES[case]
    config = BinarizationConfig(method, partition, split_on="saliency", compensation="reference")
    for name, weight, hessian, figures in reference_matrices():
        report = quantize_matrix(weight, hessian, config).report
        assert report.output_error <= 1.03 * figures[case]["output_error"], name
        assert report.weight_error <= 1.03 * figures[case]["weight_error"], name


def test_defaults_leave_a_quarter_less_error_than_the_reference():
    for name, weight, hessian, figures in reference_matrices():
        matrix = arbllm.quantize_matrix(weight, hessian)
        assert matrix.report.output_error <= 0.72 * figures["arb-rc+cgb"]["output_error"], name


@pytest.mark.parametrize("method", ["billm", "arb", "arb-x", "arb-rc"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_reported_errors_are_those_of_the_packed_matrix(method, partition):
    weight, hessian = problem()
    matrix = quantize_matrix(weight, hessian, BinarizationConfig(method, partition, block_size=16))
    difference = weight - matrix.dequantize()
    output = ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()
    assert matrix.report.output_error == pytest.approx(float(output), rel=1e-3)
    assert matrix.report.weight_error == pytest.approx(float((difference**2).sum() / (weight**2).sum()), rel=1e-3)
    assert len(matrix.error_history) == 3
    for errors in matrix.error_history:
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))


def test_the_factor_is_the_damped_inverse():
    _, hessian = problem(columns=300)
    hessian[7] = hessian[:, 7] = 0
    factor = factorize(hessian, 0.01)
    damped = hessian.clone()
    damped[7, 7] = 1
    damped += 0.01 * damped.diagonal().mean() * torch.eye(300)
    torch.testing.assert_close(factor.upper.T @ factor.upper @ damped, torch.eye(300), rtol=0, atol=1e-3)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert factor.dead.nonzero().item() == 7


def test_exact_compensation_is_the_least_squares_optimum_for_the_later_columns():
    """After block b is fixed at error E, the best later columns are W + D with D = -E H_br H_rr^-1."""
    weight, hessian = problem(columns=24)
    config = BinarizationConfig("arb", "none", block_size=8, iterations=0)
    factor = factorize(hessian, 0.01)
    damped = torch.linalg.inv(factor.upper.T @ factor.upper)
    first = quantize_matrix(weight[:, :8], hessian[:8, :8], config).dequantize()
    error = weight[:, :8] - first
    optimum = weight[:, 8:] + error @ damped[:8, 8:] @ torch.linalg.inv(damped[8:, 8:])
    expected = quantize_matrix(optimum[:, :8], hessian[:8, :8], config).dequantize()
    found = quantize_matrix(weight, hessian, config).dequantize()
    torch.testing.assert_close(found[:, :8], first)
    torch.testing.assert_close(found[:, 8:16], expected, rtol=1e-2, atol=2e-3)


def test_exact_compensation_leaves_less_error_than_the_reference_form():
    weight, hessian = problem(rows=64, columns=128, tokens=150, seed=3)
    errors = {
        form: quantize_matrix(weight, hessian, BinarizationConfig(block_size=32, compensation=form)).report.output_error
        for form in ("exact", "reference")
    }
    assert errors["exact"] < errors["reference"]


def test_damping_is_raised_with_a_warning_where_cholesky_fails():
    weight, hessian = problem()
    hessian -= 0.5 * hessian.diagonal().mean() * torch.eye(40)
    with pytest.warns(UserWarning, match="not positive definite at damping 0.01"):
        matrix = quantize_matrix(weight, hessian)
    assert matrix.report.damping > 0.01
    assert torch.isfinite(matrix.dequantize()).all()


def test_fewer_tokens_than_columns_is_no_problem():
    weight, hessian = problem(tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantize_matrix(weight, hessian).report.damping == 0.01


def test_dead_inputs_and_an_all_zero_layer_are_handled():
    weight, hessian = problem()
    hessian[3] = hessian[:, 3] = 0
    assert torch.isfinite(quantize_matrix(weight, hessian).dequantize()).all()
    silent = quantize_matrix(weight, torch.zeros(40, 40))
    assert silent.report.output_error == 0
    assert torch.count_nonzero(quantize_matrix(torch.zeros(8, 40), hessian).dequantize()) == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 129), (2, 192)])
def test_odd_shapes(shape):
    weight, hessian = problem(*shape)
    for method in ("arb-x", "arb-rc"):
        matrix = quantize_matrix(weight, hessian, BinarizationConfig(method))
        assert matrix.dequantize().shape == shape
        assert matrix.report.output_error < 1


def test_more_groups_and_half_precision_weights():
    weight, hessian = problem(rows=64, columns=128)
    two = quantize_matrix(weight.half(), hessian)
    four = quantize_matrix(weight.bfloat16(), hessian, BinarizationConfig(groups=4))
    assert four.report.output_error < two.report.output_error
    assert four.true_bits > two.true_bits


def test_bad_input_is_refused():
    weight, hessian = problem()
    with pytest.raises(ConfigError, match="needs a Hessian"):
        quantize_matrix(weight, hessian[:5, :5])
    for bad in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[2, 3] = bad
        with pytest.raises(ModelError, match="weight has NaN or infinite"):
            quantize_matrix(broken, hessian)
        spoiled = hessian.clone()
        spoiled[0, 0] = bad
        with pytest.raises(ModelError, match="Hessian has NaN or infinite"):
            quantize_matrix(weight, spoiled)


def test_the_same_input_gives_the_same_bits():
    weight, hessian = problem()
    first, second = (quantize_matrix(weight, hessian).tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
