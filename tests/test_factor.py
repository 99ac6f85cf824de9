import warnings

import pytest
import torch

from arbllm.config import BinarizationConfig
from arbllm.errors import ModelError
from arbllm.factor import INVERSE_LEAF, PART, _reverse, factorize
from arbllm.solver import quantize_matrix


def hessian_of(columns: int = 40, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator) * (0.5 + torch.rand(columns, generator=generator))
    return 2 / tokens * inputs.T @ inputs


@pytest.mark.parametrize("columns", [1, 40, 2 * INVERSE_LEAF + 44])
def test_the_factor_is_the_damped_inverse(columns):
    hessian = hessian_of(columns)
    dead = columns // 6
    if dead:
        hessian[dead] = hessian[:, dead] = 0
    factor = factorize(hessian, 0.01)
    damped = hessian.clone()
    if dead:
        damped[dead, dead] = hessian.diagonal()[torch.arange(columns) != dead].mean()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(columns)
    torch.testing.assert_close(factor.damped, damped)
    torch.testing.assert_close(factor.upper.T @ factor.upper @ damped, torch.eye(columns), rtol=0, atol=1e-3)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert factor.dead.nonzero().flatten().tolist() == ([dead] if dead else [])
    assert torch.equal(factor.hessian, hessian)


def test_inputs_that_never_fire_at_all():
    factor = factorize(torch.zeros(5, 5), 0.01)
    assert factor.dead.all()
    torch.testing.assert_close(factor.damped, 1.01 * torch.eye(5))


def test_inputs_that_never_fire_change_nothing_for_the_others_whatever_their_size():
    hessian = 1e-6 * hessian_of(40)
    hessian[::4] = hessian[:, ::4] = 0
    alive = torch.arange(40) % 4 != 0
    factor = factorize(hessian, 0.01)
    alone = factorize(hessian[alive][:, alive], 0.01)
    torch.testing.assert_close(factor.damped[alive][:, alive], alone.damped)


def test_damping_is_raised_with_a_warning_where_cholesky_fails():
    hessian = hessian_of()
    hessian -= 0.5 * hessian.diagonal().mean() * torch.eye(40)
    with pytest.warns(UserWarning, match="not positive definite at damping") as caught:
        factor = factorize(hessian, 0.01)
    first, last = (str(caught[place].message) for place in (0, -1))
    assert "at damping 0.01; trying 0.04" in first
    assert f"trying {factor.damping:g}" in last
    assert torch.linalg.eigvalsh(factor.damped).min() > 0
    torch.testing.assert_close(factor.upper.T @ factor.upper @ factor.damped, torch.eye(40), rtol=0, atol=1e-3)


def test_fewer_tokens_than_columns_is_no_problem():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert factorize(hessian_of(tokens=5)).damping == 0.01


def test_half_precision_is_factorised_in_single():
    assert factorize(hessian_of().half()).upper.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_numbers_are_refused(bad):
    hessian = hessian_of()
    hessian[3, 4] = bad
    with pytest.raises(ModelError, match=r"Hessian has NaN or infinite entries.*--dtype float32"):
        factorize(hessian)


@pytest.mark.filterwarnings("ignore:the Hessian is not positive definite")
def test_a_matrix_that_no_damping_helps_is_refused():
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1e9
    with pytest.raises(ModelError, match=r"at any damping.*calibrate"):
        factorize(hessian)


def test_shrinkage_weakens_correlations_alone():
    hessian = hessian_of()
    factor = factorize(hessian, 0.01, shrinkage=0.25)
    unit = hessian.diagonal().mean()
    expected = hessian + torch.diag(0.25 * hessian.diagonal() + 0.01 * unit)
    torch.testing.assert_close(factor.damped, expected)
    torch.testing.assert_close(factor.upper.T @ factor.upper @ expected, torch.eye(40), rtol=0, atol=1e-3)
    assert torch.equal(factor.hessian, hessian)


def test_shrinkage_helps_where_tokens_are_few():
    """The error on all inputs of a matrix that was solved with what 60 tokens show of 40 inputs."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(40, 40, generator=generator) / 40**0.5 + torch.eye(40)
    exact, inputs = mixing.T @ mixing, torch.randn(60, 40, generator=generator) @ mixing
    weight, few = torch.randn(64, 40, generator=generator), inputs.T @ inputs / 60

    def error(shrinkage: float) -> float:
        factor = factorize(few, 0.01, shrinkage)
        difference = weight - quantize_matrix(weight, few, BinarizationConfig(bits=2.6), factor=factor).dequantize()
        return float(((difference @ exact) * difference).sum())

    assert error((40 / 60) ** 0.5) < 0.95 * error(0.0)


def test_without_u_all_else_stays():
    factor = factorize(hessian_of(), shrinkage=0.5)
    light = factor.without_upper()
    torch.testing.assert_close(light.inverse_diagonal, (factor.upper.T @ factor.upper).diagonal())
    assert torch.equal(light.damped, factor.damped)
    assert torch.equal(light.damped.diagonal(), light.damped_diagonal)
    assert light.upper.numel() == 0


def test_columns_in_another_order():
    factor = factorize(hessian_of(2 * INVERSE_LEAF + 44), shrinkage=0.5)
    order = torch.randperm(2 * INVERSE_LEAF + 44, generator=torch.Generator().manual_seed(0))
    expected = factor.damped[order][:, order]
    assert torch.equal(factor.reordered(order), expected)
    torch.testing.assert_close(factor.reordered_upper(order), factorize(expected, 1e-6).upper)


@pytest.mark.parametrize("size", [1, 2, 7, 2 * PART + 3])
def test_reversal_in_place(size):
    vector = torch.arange(size)
    _reverse(vector)
    assert torch.equal(vector, torch.arange(size).flip(0))


def test_strides_do_not_matter():
    x = torch.randn(6, 20)
    hessian = x @ x.T
    found = factorize(hessian.T.contiguous().T)
    assert torch.equal(found.upper, factorize(hessian).upper)
