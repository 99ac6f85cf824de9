import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.binarize.row_column import fit_arb_rc

shapes = st.tuples(st.integers(1, 9), st.integers(1, 14))


@given(seed=st.integers(0, 10_000), shape=shapes)
def test_a_signed_rank_one_matrix_is_recovered(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    magnitudes = (torch.rand(rows, generator=generator) + 0.1)[:, None] * (
        torch.rand(columns, generator=generator) + 0.1
    )
    values = magnitudes * torch.where(torch.rand(rows, columns, generator=generator) < 0.5, 1.0, -1.0)
    zone = fit_arb_rc(values, torch.ones_like(values, dtype=torch.bool), 1, 15, None).zone
    torch.testing.assert_close(zone.reconstruct(), values, rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 10_000), shape=shapes, order=st.sampled_from([1, 2]), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_no_step_raises_the_error_and_mean_column_scale_is_one(seed, shape, order, share):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < share
    fit = fit_arb_rc(values, mask, order, 15, None)
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.errors))
    assert torch.isfinite(fit.zone.reconstruct()).all()
    if mask.all():
        for term in fit.zone.terms[: 1 if min(shape) == 1 else 2]:  # a rank-one matrix leaves the second term nothing
            torch.testing.assert_close(term.column_scales.abs().mean(), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_first_order_reaches_the_best_rank_one_fit_of_the_magnitudes():
    values = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    fit = fit_arb_rc(values, torch.ones_like(values, dtype=torch.bool), 1, 200, None)
    singular = torch.linalg.svdvals(values.abs())
    best = float(singular[1:].square().sum())
    assert abs(fit.errors[-1] - best) < 1e-3 * best


def test_second_signs_lower_the_error():
    values = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(values, dtype=torch.bool)
    assert fit_arb_rc(values, mask, 2, 15, None).errors[-1] < 0.5 * fit_arb_rc(values, mask, 1, 15, None).errors[-1]
