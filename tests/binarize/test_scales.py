import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.binarize.scales import LARGEST_CODE, STEPS_PER_OCTAVE, ScaleCodes, positive_codes, shares

HALF_A_STEP = 2 ** (0.5 / STEPS_PER_OCTAVE) - 1


def random_scales(seed: int, slots: int, length: int) -> torch.Tensor:
    """Positive scales over nine octaves."""
    return torch.exp2(-9 * torch.rand(slots, length, generator=torch.Generator().manual_seed(seed)))


def values(stored: ScaleCodes) -> torch.Tensor:
    return stored.largest[:, None] * shares(stored.codes)


def test_shares_are_what_the_description_says():
    found = shares(torch.arange(256, dtype=torch.uint8))
    assert found[0] == 0
    assert found[LARGEST_CODE] == 1
    for code in (1, 100, 231, 254):
        assert float(found[code]) == pytest.approx(2 ** ((code - 255) / 24), rel=1e-6)
    assert (found.diff() > 0).all()
    assert shares(torch.tensor([[255, 231], [207, 0]], dtype=torch.uint8)).tolist() == [[1, 0.5], [0.25, 0]]


@given(seed=st.integers(0, 10_000), slots=st.integers(1, 4), length=st.integers(1, 30), size=st.integers(-12, 12))
def test_a_scale_is_off_by_half_a_step_at_most(seed, slots, length, size):
    scales = random_scales(seed, slots, length) * 2.0**size
    stored = positive_codes(scales)
    assert stored.codes.dtype == torch.uint8
    assert ((values(stored) / scales - 1).abs() <= HALF_A_STEP + 1e-5).all()
    assert HALF_A_STEP < 0.015
    # The largest is kept exactly, and what has been rounded stays.
    assert torch.equal(stored.largest, scales.amax(1))
    assert torch.equal(positive_codes(values(stored)).codes, stored.codes)


def test_each_slot_goes_by_its_own_largest_scale():
    scales = random_scales(1, 3, 8)
    shrunk = scales * torch.tensor([1.0, 2.0**-20, 2.0**20])[:, None]
    assert torch.equal(positive_codes(shrunk).codes, positive_codes(scales).codes)


def test_zero_and_all_that_is_far_below_the_largest_scale():
    smallest = 2 ** (-254 / 24)
    scales = torch.tensor([[1, smallest, 0.9 * smallest, 1e-9, 0]])
    assert positive_codes(scales).codes.tolist() == [[255, 1, 0, 0, 0]]
    silent = positive_codes(torch.zeros(2, 3))
    assert torch.count_nonzero(values(silent)) == 0
    assert torch.isfinite(values(silent)).all()
