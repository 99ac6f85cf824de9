import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbllm.binarize.alternating import plain, squared_error
from arbllm.binarize.partition import (
    PERCENTILES,
    _errors_of_splits,
    _percentiles,
    _Prefix,
    _second_order_errors,
    salient_columns,
    split_by_saliency,
    split_by_weight,
)


def zone_error(values: torch.Tensor, mask: torch.Tensor, centered: bool) -> float:
    """The plain error of one zone, by quantizing it."""
    if centered:
        return squared_error(values, plain(values, mask, 1))
    scales = (values.abs() * mask).sum(1) / mask.sum(1).clamp(min=1)
    return float(((values.abs() - scales[:, None]) * mask).square().sum())


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, 20), centered=st.booleans(), positive=st.booleans())
def test_every_threshold_has_the_error_that_quantizing_gives(seed, columns, centered, positive):
    values = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed)) + 0.3
    values = values.square() if positive else values
    thresholds = values.abs().flatten().sort().values[:: max(1, columns // 3)]
    prefix = _Prefix.of(values, centered)
    inside = prefix.within(thresholds)
    errors = prefix.errors(prefix.within(None), inside) + prefix.errors(inside, prefix.within(None, everything=True))
    for threshold, error in zip(thresholds, errors, strict=True):
        small = values.abs() <= threshold
        expected = zone_error(values, small, centered) + zone_error(values, ~small, centered)
        assert float(error) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("centered", [True, False])
def test_two_groups_are_the_best_of_all_candidate_thresholds(centered):
    values = torch.randn(30, 64, generator=torch.Generator().manual_seed(4))
    codes = split_by_weight(values, 2, centered)

    def error(large: torch.Tensor) -> float:
        return zone_error(values, ~large, centered) + zone_error(values, large, centered)

    best = min(error(values.abs() > t) for t in np.percentile(values.abs().numpy(), PERCENTILES))
    assert error(codes == 1) == pytest.approx(best, rel=1e-4)


def test_four_groups_are_ordered_by_magnitude_and_beat_two():
    values = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    codes = split_by_weight(values, 4, centered=False)
    assert codes.unique().tolist() == [0, 1, 2, 3]
    tops = [float(values[codes == group].abs().max()) for group in range(4)]
    assert tops == sorted(tops)
    four = sum(zone_error(values, codes == group, False) for group in range(4))
    two = split_by_weight(values, 2, centered=False)
    assert four < 0.6 * sum(zone_error(values, two == group, False) for group in range(2))


def test_saliency_split_counts_the_blanked_columns_among_its_percentiles():
    saliency = torch.rand(20, 10, generator=torch.Generator().manual_seed(6))
    without, many = split_by_saliency(saliency, 2, 0), split_by_saliency(saliency, 2, 10_000)
    assert set(without.unique().tolist()) == {0, 1}
    # Nearly every percentile is now zero, so the only split left puts every weight into the large group.
    assert many.float().mean() == 1
    assert set(split_by_saliency(saliency, 4, 0).unique().tolist()) == {0, 1, 2, 3}


def test_percentiles_agree_with_numpy():
    values = torch.randn(501, generator=torch.Generator().manual_seed(7))
    np.testing.assert_allclose(_percentiles(values), np.percentile(values.numpy(), PERCENTILES), rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), width=st.sampled_from([2, 9, 60]))
def test_salient_columns_are_the_best_of_the_top_k(seed, width):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(12, width, generator=generator) * torch.rand(width, generator=generator).pow(4)
    found = salient_columns(saliency)
    order = saliency.sum(0).argsort(descending=True)

    def error(count: int) -> float:
        return sum(
            squared_error(part, plain(part, torch.ones_like(part, dtype=torch.bool), 2))
            for part in (saliency[:, order[:count]], saliency[:, order[count:]])
        )

    errors = [error(count) for count in range(1, min(49, width - 1) + 1)]
    count = int(found.sum())
    assert set(found.nonzero().squeeze(1).tolist()) == set(order[:count].tolist())
    assert errors[count - 1] <= min(errors) * (1 + 1e-4) + 1e-6


def test_a_block_of_one_column_has_no_salient_column():
    assert not salient_columns(torch.rand(5, 1)).any()


@pytest.mark.parametrize(("width", "rows"), [(128, 300), (50, 11), (3, 7)])
def test_splits_priced_together_cost_what_each_does(width, rows):
    """A GPU takes many at a time."""
    ranked = torch.rand(width, rows, generator=torch.Generator().manual_seed(width)) ** 3
    most = min(49, width - 1)
    together = [_second_order_errors(ranked, counts) for counts in torch.arange(1, most + 1).split(7)]
    each = _errors_of_splits(ranked, most)
    torch.testing.assert_close(torch.cat(together), each, rtol=1e-4, atol=1e-6 * float(each.max()))
