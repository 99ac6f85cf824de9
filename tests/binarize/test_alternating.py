import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbllm.binarize.alternating import fit_arb, fit_plain, plain, plain_first, squared_error
from arbllm.binarize.block import signs_of


def random_zone(seed: int, rows: int, columns: int, share: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * (1 + torch.arange(columns)) ** -0.5 + 0.2
    return values, torch.rand(rows, columns, generator=generator) < share


@given(seed=st.integers(0, 10_000), columns=st.integers(2, 40), rounds=st.integers(1, 15))
def test_theorem_1_gives_the_error_after_the_scale_step(seed, columns, rounds):
    """L1_t = L1_0 - m (r_t^2 - r_0^2 - (mu_t - mu_0)^2), taken right after the r step (paper, Theorem 1)."""
    row = random_zone(seed, 1, columns)[0].double()
    first_mean = mean = row.mean()
    signs = signs_of(row - mean)
    first_scale = scale = (row - mean).abs().mean()
    first_error = (row - mean - scale * signs).square().sum()
    for _ in range(rounds):
        mean = mean + (row - mean - scale * signs).mean()
        scale = (signs * (row - mean)).mean()
        error = (row - mean - scale * signs).square().sum()
        predicted = first_error - columns * (scale**2 - first_scale**2 - (mean - first_mean) ** 2)
        torch.testing.assert_close(error, predicted, rtol=1e-9, atol=1e-12)
        signs = signs_of(row - mean)
        assert (row - mean - scale * signs).square().sum() <= error + 1e-12


@given(seed=st.integers(0, 10_000), order=st.sampled_from([1, 2]), share=st.sampled_from([0.0, 0.1, 0.7, 1.0]))
def test_arb_never_raises_the_error(seed, order, share):
    values, mask = random_zone(seed, 5, 12, share)
    fit = fit_arb(values, mask, order, 15, None)
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.errors))
    assert fit.errors[0] == fit_plain(values, mask, order, 15, None).errors[0]
    assert abs(fit.errors[-1] - squared_error(values, fit.zone)) <= 1e-6 * (1 + fit.errors[-1])


def test_arb_lies_between_the_plain_quantizer_and_the_best_of_all_sign_patterns():
    values, mask = random_zone(3, 6, 10, 1.0)
    best = 0.0
    for row in values:
        errors = []
        for pattern in itertools.product([-1.0, 1.0], repeat=10):
            basis = torch.stack([torch.ones(10), torch.tensor(pattern)], 1)
            solution = torch.linalg.lstsq(basis, row[:, None], driver="gelsd").solution
            errors.append(float((row[:, None] - basis @ solution).square().sum()))
        best += min(errors)
    reached = fit_arb(values, mask, 1, 50, None).errors
    assert best - 1e-5 <= reached[-1] < reached[0]


def test_plain_uses_masked_weights_alone_and_counts_zero_as_positive():
    values = torch.tensor([[1.0, -3.0, 100.0], [0.0, 0.0, -7.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    means, scales, signs = plain_first(values, mask)
    torch.testing.assert_close(means, torch.tensor([-1.0, 0.0]))
    torch.testing.assert_close(scales, torch.tensor([2.0, 0.0]))
    assert signs[1, 0] == 1
    assert signs[0, :2].tolist() == [1, -1]


def test_rows_without_a_masked_weight_stay_zero():
    values, _ = random_zone(0, 3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for order in (1, 2):
        zone = fit_arb(values, mask, order, 5, None).zone
        assert torch.count_nonzero(zone.row_means) == 0
        assert all(torch.count_nonzero(term.row_scales) == 0 for term in zone.terms)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_second_order_start_is_two_plain_fits(seed):
    values, mask = random_zone(seed, 4, 9)
    means, scales, signs = plain_first(values, mask)
    residual = values - means[:, None] - scales[:, None] * signs
    again = plain_first(residual, mask)
    zone = plain(values, mask, 2)
    torch.testing.assert_close(zone.row_means, means + again[0])
    torch.testing.assert_close(zone.terms[1].row_scales, again[1])
    assert squared_error(values, zone) <= squared_error(values, plain(values, mask, 1)) + 1e-5
