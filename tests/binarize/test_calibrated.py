import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbllm.binarize.alternating import fit_arb
from arbllm.binarize.calibrated import fit_arb_x


def problem(seed: int, rows: int = 6, columns: int = 10, tokens: int = 40):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    inputs = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator) * 3
    return values, mask, inputs


def calibrated_error(values, mask, inputs, zone) -> float:
    residual = (values - zone.reconstruct()) * mask
    return float((residual @ inputs.T).square().sum())


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), order=st.sampled_from([1, 2]))
def test_the_error_from_s_is_the_output_error_on_the_inputs_and_never_rises(seed, order):
    values, mask, inputs = problem(seed)
    fit = fit_arb_x(values, mask, order, 15, inputs.T @ inputs)
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.errors))
    torch.testing.assert_close(fit.errors[-1], calibrated_error(values, mask, inputs, fit.zone), rtol=1e-3, atol=1e-3)
    start = fit_arb(values, mask, order, 15, None).zone
    torch.testing.assert_close(fit.errors[0], calibrated_error(values, mask, inputs, start), rtol=1e-3, atol=1e-3)
    for refined, frozen in zip(fit.zone.terms, start.terms, strict=True):
        assert torch.equal(refined.signs, frozen.signs)


def test_many_rounds_reach_the_least_squares_solution_of_each_row():
    values, _, inputs = problem(5)
    mask = torch.ones_like(values, dtype=torch.bool)
    zone = fit_arb_x(values, mask, 1, 5000, inputs.T @ inputs).zone
    for row in range(values.shape[0]):
        basis = inputs @ torch.stack([torch.ones(values.shape[1]), zone.terms[0].signs[row]], 1)
        solution = torch.linalg.lstsq(basis, (inputs @ values[row])[:, None]).solution[:, 0]
        best = (inputs @ values[row] - basis @ solution).square().sum()
        reached = (inputs @ (values[row] - zone.reconstruct()[row])).square().sum()
        assert reached <= 1.001 * best


def test_inputs_that_never_fire_leave_the_parameters_finite():
    values, mask, _ = problem(1)
    for order in (1, 2):
        zone = fit_arb_x(values, mask, order, 15, torch.zeros(10, 10)).zone
        assert torch.isfinite(zone.reconstruct()).all()
