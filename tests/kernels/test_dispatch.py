import pytest
import torch

from arbllm.errors import ConfigError
from arbllm.kernels import cpu
from arbllm.kernels.dispatch import KERNELS, get_kernel, preparing_kernel
from tests.helpers import random_matrix


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_multiplies(name):
    matrix, x = random_matrix(33, 70, salient=9, row_means=True), torch.randn(2, 3, 70)
    torch.testing.assert_close(get_kernel(name)(x, matrix), x @ matrix.dequantize().T)


def test_unknown_kernel_is_named_with_those_that_exist():
    with pytest.raises(ConfigError, match="'fast' is unknown; choose one of reference"):
        get_kernel("fast")


@pytest.mark.skipif(not cpu.available(), reason="arbllm was installed without its C++ kernels")
def test_what_the_kernel_leaves_to_others():
    assert preparing_kernel(torch.randn(1, 4)) is cpu
    assert preparing_kernel(torch.randn(1, 4, dtype=torch.float64)) is None
    assert preparing_kernel(torch.randn(1, 4, requires_grad=True)) is None
    with torch.no_grad():
        assert preparing_kernel(torch.randn(1, 4, requires_grad=True)) is cpu
