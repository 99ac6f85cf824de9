import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.binarize.binarize import binarize_block
from arbllm.binarize.block import nearest_signs, signs_of
from arbllm.binarize.methods import METHODS


@given(seed=st.integers(0, 10_000), positive=st.booleans())
def test_nearest_signs_are_the_best_of_the_four_points(seed, positive):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 5, generator=generator) * 2
    first, second = torch.randn(2, 3, 5, generator=generator)
    if positive:
        first, second = first.abs(), second.abs()
    chosen = nearest_signs(values, first, second)
    reached = (values - chosen[0] * first - chosen[1] * second).abs()
    points = [(values - a * first - b * second).abs() for a, b in itertools.product([-1, 1], repeat=2)]
    torch.testing.assert_close(reached, torch.stack(points).amin(0), rtol=1e-5, atol=1e-6)


def test_signs_are_never_zero():
    assert signs_of(torch.tensor([0.0, -0.0, -1.0, 2.0])).tolist() == [1, 1, -1, 1]


def test_rounding_is_idempotent_and_changes_scales_by_less_than_float16_spacing():
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for method in [method for method in METHODS.values() if not method.joint]:
        block = binarize_block(weight, weight.square(), torch.eye(32), method).block
        stored = block.rounded()
        assert torch.equal(stored.reconstruct(), stored.rounded().reconstruct())
        torch.testing.assert_close(stored.reconstruct(), block.reconstruct(), rtol=2e-2, atol=2e-3)
